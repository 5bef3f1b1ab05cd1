"""The commands, and `serve` as the default one."""

from __future__ import annotations

import typer

from node.cli import demo, publish, pull, remote, serve, split, verify
from node.cli.console import fail
from node.config import ConfigError
from protocol.errors import ShoalError

app = typer.Typer(
    name="node",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes leave a third of an 80-column line for the text
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Shoal: puts model and data shards onto machines peer to peer, and runs models across them.",
    epilog="Without a command the daemon starts: `python -m node --data-dir ~/shoal` is `python -m node serve ...`.",
)
app.command("serve", epilog=serve.EPILOG)(serve.serve)
app.command("split", epilog=split.EXAMPLES)(split.split)
app.command("publish", epilog=publish.EXAMPLES)(publish.publish)
app.command("pull", epilog=pull.EXAMPLES)(pull.pull)
app.command("verify", epilog=verify.EXAMPLES)(verify.verify)
app.command("call", epilog=remote.CALL_EXAMPLES)(remote.call)
app.command("nodes", epilog=remote.NODES_EXAMPLES)(remote.nodes)
app.command("status", epilog=remote.STATUS_EXAMPLES)(remote.status)
app.command("generate", epilog=remote.GENERATE_EXAMPLES)(remote.generate)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)

_COMMANDS = tuple(command.name for command in app.registered_commands if command.name)


def run(argv: list[str]) -> None:
    """Run one command line; `serve` where it names no command."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("--help", "-h")):
        argv = ["serve", *argv]
    elif not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        fail(f"there is no command {argv[0]!r}; the commands are: {', '.join(_COMMANDS)}", code=2)
    try:
        app(argv, prog_name="python -m node")
    except ConfigError as error:
        fail(error, code=2)
    except ShoalError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
