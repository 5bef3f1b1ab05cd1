"""Options of the command line, made from the declarations of node/config.py."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize

from node.config import Settings, load_settings

ConfigFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="TOML file of the settings.", envvar="SHOAL_CONFIG")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON.")]


def option(name: str, text: str | None = None, *, also: str | None = None) -> Any:
    """The typer option of a setting, by the setting's name; with another help text if the daemon's does not fit.

    `also` is another name that it may be typed by.
    """
    flag = Settings.flag(name)
    names = [flag.names, also] if also else [flag.names]
    return typer.Option(*names, metavar=flag.metavar, help=text or flag.help)


DataDir = Annotated[Path | None, option("data_dir", "Of the daemon.")]
ShardsDir = Annotated[Path | None, option("shards_dir", "Of the daemon. Default: DATA_DIR/shards.")]
O3Endpoint = Annotated[str | None, option("o3_endpoint")]
S3Endpoint = Annotated[str | None, option("s3_endpoint")]
OriginKeyFile = Annotated[Path | None, option("origin_key_file")]


def with_settings(run: Callable[[Settings], None]) -> Callable[..., None]:
    """A typer command that has every setting as an option, and hands those that were typed on as Settings."""

    def command(**flags: Any) -> None:
        run(load_settings(**{name: value for name, value in flags.items() if value not in (None, [])}))

    hints = typing.get_type_hints(Settings)
    annotations = {name: Annotated[_typed_as(hints[name]) | None, option(name)] for name in Settings.model_fields}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in annotations.items()
        ]
    )
    command.__annotations__ = annotations
    command.__name__, command.__doc__ = run.__name__, run.__doc__
    return command


def _typed_as(kind: Any) -> Any:
    """What a setting of some type is on the command line: sizes and lists are read by the settings themselves."""
    if isinstance(kind, types.UnionType):
        (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        return list[str]
    return str if kind is ByteSize else kind
