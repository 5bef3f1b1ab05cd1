"""The commands, and `serve` as the default one."""

from __future__ import annotations

import difflib
import importlib.metadata
from typing import Annotated

import typer

from node.cli import check_o3, demo, publish, pull, remote, serve, split, verify
from node.cli.console import examples, fail
from node.config import ConfigError
from protocol.errors import ShoalError

PROGRAM = "shoal"
EPILOG = (
    "Without a command the daemon starts: `shoal` is `shoal serve`. `python -m node` is the same program.\n\n"
    + examples(
        "shoal demo",
        "shoal split model.gguf --out ~/.local/share/shoal/shards/my-model --shards 3",
        "shoal",
        'shoal generate 127.0.0.1:7400 --prompt "Why is the sky blue?"',
    )
)
app = typer.Typer(
    name=PROGRAM,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes leave a third of an 80-column line for the text
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Shoal: puts model and data shards onto machines peer to peer, and runs models across them.",
    epilog=EPILOG,
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
app.command("check-o3", epilog=check_o3.EXAMPLES)(check_o3.check_o3)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)

_COMMANDS = tuple(command.name for command in app.registered_commands if command.name)
_OF_ALL = ("--help", "-h", "--version", "--install-completion", "--show-completion")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {importlib.metadata.version('shoal')}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of all commands."""


def run(argv: list[str]) -> None:
    """Run one command line; `serve` if it names no command."""
    if not argv or (argv[0].startswith("-") and argv[0].partition("=")[0] not in _OF_ALL):
        argv = ["serve", *argv]
    elif not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        near = difflib.get_close_matches(argv[0], _COMMANDS, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        fail(f"there is no command {argv[0]!r}; {meant}the commands are: {', '.join(_COMMANDS)}", code=2)
    try:
        app(argv, prog_name=PROGRAM)
    except ConfigError as error:
        fail(error, code=2)
    except ShoalError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
