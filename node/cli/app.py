"""The commands, and `serve` as the default one."""

from __future__ import annotations

import sys

import typer

from node.cli import demo, files, remote, serve
from node.cli.console import fail
from node.config import ConfigError
from protocol.errors import ShoalError

app = typer.Typer(
    name="node",
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Shoal: puts model and data shards onto machines peer to peer, and runs models across them.",
    epilog="Without a command the daemon starts: `python -m node --data-dir ~/shoal` is `python -m node serve ...`.",
)
app.command("serve")(serve.serve)
app.command("split")(files.split)
app.command("publish")(files.publish)
app.command("call")(remote.call)
app.command("nodes")(remote.nodes)
app.command("status")(remote.status)
app.command("generate")(remote.generate)
app.command("demo")(demo.demo)

_COMMANDS = frozenset(command.name for command in app.registered_commands)


def run(argv: list[str]) -> None:
    """Run one command line; `serve` where it names no command."""
    if not argv or (argv[0] not in _COMMANDS and argv[0] not in ("--help", "-h")):
        if argv and not argv[0].startswith("-"):
            fail(
                f"there is no command {argv[0]!r}; the commands are: {', '.join(sorted(filter(None, _COMMANDS)))}",
                code=2,
            )
        argv = ["serve", *argv]
    try:
        app(["--help" if arg == "-h" else arg for arg in argv], prog_name="python -m node")
    except (ShoalError, ConfigError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
