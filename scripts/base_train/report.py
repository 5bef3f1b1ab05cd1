"""What base_train says: lines and a bar for people, a line of JSON an event for programs."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from torch_bridge.shards.status import StreamingStatus


class Report:
    """For rank 0; on the other ranks it says nothing."""

    def __init__(self, *, as_json: bool, speaks: bool, steps: int) -> None:
        self._json, self._speaks = as_json, speaks
        self._console = Console(highlight=False, stderr=as_json, soft_wrap=True)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[now]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not speaks or as_json or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps, now="")
        if speaks:
            logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Lines(self)])

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, event: str, line: str, **values: Any) -> None:
        """One event: the line for people, the values for programs."""
        if not self._speaks:
            return
        if self._json:
            sys.stdout.write(json.dumps({"event": event} | values) + "\n")
            sys.stdout.flush()
        else:
            self._console.print(line, markup=False)

    def step(self, step: int, loss: float, tokens_s: float) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step, now=f"loss {loss:.4f}  {tokens_s:,.0f} tokens/s")

    def status(self, step: int, status: StreamingStatus | None) -> None:
        """Of the window of shards."""
        if status is not None:
            self.say("streaming", f"  streaming  {_words(status)}", step=step, **dataclasses.asdict(status))


class _Lines(logging.Handler):
    """Warnings go above the bar."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.say("warning", f"  warning    {self.format(record)}", message=self.format(record))


def _words(status: StreamingStatus) -> str:
    moved = ", ".join(f"{kilobytes(size)} from {source}" for source, size in sorted(status.bytes_by_source.items()))
    words = [
        f"{len(status.ready)} here",
        f"{len(status.downloading)} on the way",
        f"{status.consumed} done",
        f"{status.deleted} deleted",
        moved or "nothing moved",
        f"waited {status.waits_s:.2f} s",
    ]
    if status.failed:
        name, why = min(status.failed.items())
        words.append(f"{len(status.failed)} failed ({name}: {why})")
    return " · ".join(words)


def kilobytes(size: int) -> str:
    """12345 -> '12.3 kB'."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"
