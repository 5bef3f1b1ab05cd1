"""The commands, and `serve` as the default one."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
from collections.abc import Iterable, Mapping
from typing import Annotated

import typer

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
_COMMANDS: Mapping[str, tuple[str, str]] = {
    "serve": ("node.cli.serve", "EPILOG"),
    "split": ("node.cli.split", "EXAMPLES"),
    "publish": ("node.cli.publish", "EXAMPLES"),
    "pull": ("node.cli.pull", "EXAMPLES"),
    "files": ("node.cli.shards", "FILES_EXAMPLES"),
    "unpin": ("node.cli.shards", "UNPIN_EXAMPLES"),
    "evict": ("node.cli.shards", "EVICT_EXAMPLES"),
    "verify": ("node.cli.verify", "EXAMPLES"),
    "call": ("node.cli.remote", "CALL_EXAMPLES"),
    "nodes": ("node.cli.remote", "NODES_EXAMPLES"),
    "status": ("node.cli.remote", "STATUS_EXAMPLES"),
    "generate": ("node.cli.remote", "GENERATE_EXAMPLES"),
    "check-o3": ("node.cli.check_o3", "EXAMPLES"),
    "demo": ("node.cli.demo", "EXAMPLES"),
}
"""By name: the module with a function of that name, and its examples. Only what is typed is imported."""
_OF_ALL = ("--help", "-h", "--version", "--install-completion", "--show-completion")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {importlib.metadata.version('shoal')}")
        raise typer.Exit


def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of all commands."""


def build_app(names: Iterable[str] = tuple(_COMMANDS)) -> typer.Typer:
    """The program with these commands."""
    app = typer.Typer(
        name=PROGRAM,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # its boxes leave a third of an 80-column line for the text
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Shoal: puts model and data shards onto machines peer to peer, and runs models across them.",
        epilog=EPILOG,
    )
    app.callback()(_options)
    for name in names:
        module_name, epilog = _COMMANDS[name]
        module = importlib.import_module(module_name)
        app.command(name, epilog=getattr(module, epilog))(getattr(module, name.replace("-", "_")))
    return app


def run(argv: list[str]) -> None:
    """Run one command line; `serve` if it names no command."""
    if not argv or (argv[0].startswith("-") and argv[0].partition("=")[0] not in _OF_ALL):
        argv = ["serve", *argv]
    elif not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        near = difflib.get_close_matches(argv[0], _COMMANDS, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        fail(f"there is no command {argv[0]!r}; {meant}the commands are: {', '.join(_COMMANDS)}", code=2)
    is_completion = f"_{PROGRAM.upper()}_COMPLETE" in os.environ
    try:
        build_app([argv[0]] if argv[0] in _COMMANDS and not is_completion else _COMMANDS)(argv, prog_name=PROGRAM)
    except ConfigError as error:
        fail(error, code=2)
    except ShoalError as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
