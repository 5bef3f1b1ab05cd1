"""How the commands print: tables and progress for people on a terminal, JSON for programs, errors to stderr."""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Column

from protocol.errors import ShoalError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One line of JSON on stdout; bytes as hex."""
    plain = msgspec.to_builtins(value, builtin_types=(bytes,))
    sys.stdout.write(json.dumps(plain, default=lambda b: b.hex(), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def fail(error: Exception | str, *, code: int = 1) -> NoReturn:
    """Say what went wrong in one line, with its code where it has one, and exit."""
    prefix = f"error ({error.code}): " if isinstance(error, ShoalError) else "error: "
    err.print(f"[bold red]{prefix}[/]", end="")
    err.print(str(error), markup=False, soft_wrap=True)
    sys.exit(code)


def bytes_progress(console: Console = err) -> Progress:
    """Bars for things that are counted in bytes."""
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=18),
        DownloadColumn(binary_units=True, table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        console=console,
    )


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
