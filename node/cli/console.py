"""How the commands print: tables and progress for people on a terminal, JSON for programs, errors to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from protocol.errors import ShoalError
from protocol.manifest import Manifest

SHOWN_SHARDS = 50
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def examples(*commands: str) -> str:
    """The end of a help text: command lines as they are typed, not wrapped."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def print_json(value: Any, file: TextIO | None = None) -> None:
    """One line of JSON on stdout, or on `file`; bytes as hex."""
    file = file or sys.stdout
    plain = msgspec.to_builtins(value, builtin_types=(bytes,))
    file.write(json.dumps(plain, default=bytes.hex, ensure_ascii=False) + "\n")
    file.flush()


def fail(error: Exception | str, *, code: int = 1) -> NoReturn:
    """Say what went wrong in one line, with its code if it has one, and exit; 2 is for what was typed wrong."""
    prefix = f"error ({error.code}): " if isinstance(error, ShoalError) else "error: "
    err.print(f"[bold red]{prefix}[/]", end="")
    err.print(str(error), markup=False, soft_wrap=True)
    sys.exit(code)


def bytes_progress(console: Console = err) -> Progress:
    """Bars for things that are counted in bytes."""
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=18),
        DownloadColumn(binary_units=True, table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        console=console,
    )


def show_manifest(
    manifest: Manifest, folder: Path | None, *, json_output: bool, more: Mapping[str, Any] | None = None
) -> None:
    """What was split or published: a line a shard, then the name that finds it. `more` goes into the JSON."""
    if json_output:
        fields = {"digest": manifest.digest, "folder": str(folder) if folder else None, "manifest": manifest}
        print_json(fields | dict(more or {}))
        return
    for entry in manifest.shards[:SHOWN_SHARDS]:
        layers = "" if entry.end_layer is None else f"  layers [{entry.start_layer}, {entry.end_layer})"
        line = f"  {entry.shard_id:>4}  {entry.filename}  {human_bytes(entry.size)}{layers}"
        out.print(line, markup=False, soft_wrap=True)
    if (left := len(manifest.shards) - SHOWN_SHARDS) > 0:
        out.print(f"        and {left} more")
    count = "1 file" if len(manifest.shards) == 1 else f"{len(manifest.shards)} shards"
    line = f"{manifest.kind} {manifest.name}: {count}, {human_bytes(manifest.total_bytes)}"
    line += f", in {folder}" if folder else ""
    out.print(line, markup=False, soft_wrap=True)
    out.print(f"{manifest.name}@{manifest.digest}", markup=False, soft_wrap=True)


def add_row(table: Table, *cells: str) -> None:
    """Add cells whose text is shown as it is: names come from peers, and rich would read [brackets] in them."""
    table.add_row(*map(Text, cells))


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
