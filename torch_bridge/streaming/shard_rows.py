"""The rows of the shards that one iteration reads: it waits for a shard, opens it, fetches a damaged one again."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from protocol.errors import InsufficientMemoryError, InvalidShardError, ShardInUseError
from protocol.manifest import ShardEntry
from torch_bridge.shards.downloader import StreamingDownloader
from torch_bridge.shards.readers import LEAVING_S
from torch_bridge.streaming.order import EpochOrder, RowSpan
from torch_bridge.streaming.rows import ShardDecoder
from torch_bridge.streaming.schema import DataColumns, joined

_log = logging.getLogger(__name__)
_LOOK_S = 0.1
_TELL_AFTER_S = 2.0
FETCHED_AGAIN = 3
"""How often one shard is fetched again in an iteration, on a disk that damages it each time."""


class ShardRows:
    """The windows of one reader, from the shards that it reads. Not thread-safe.

    Decoded at a time: a window of each lane, and of each open shard what other lanes' windows take soon.
    """

    def __init__(
        self,
        entries: Sequence[ShardEntry],
        downloader: StreamingDownloader,
        columns: DataColumns,
        order: EpochOrder,
        numbers: range,
        timeout_s: float | None,
    ) -> None:
        """`entries`: the shards of the order. `numbers`: the batches that are read, ascending."""
        self._entries, self._downloader, self._columns = entries, downloader, columns
        self._order, self._numbers, self._timeout_s = order, numbers, timeout_s
        self._open: dict[int, ShardDecoder] = {}
        self._windows: dict[int, tuple[int, pa.Table]] = {}

    def table(self, number: int) -> pa.Table:
        """The batch's rows in its order. Raises as `wait_for_shard` for a shard that does not come."""
        parts = self._order.parts(number)
        return joined(
            [self._window(part.lane, part.window).slice(part.start, part.stop - part.start) for part in parts]
        )

    def past(self, shard: int) -> None:
        """This iteration reads no more rows of the shard."""
        self._close(shard)
        self._downloader.consumed(self._entries[shard])

    def close(self) -> None:
        self._windows.clear()
        for shard in list(self._open):
            self._close(shard)

    def _window(self, lane: int, window: int) -> pa.Table:
        """In the order in which batches take its rows."""
        if self._windows.get(lane, (-1,))[0] != window:
            self._windows.pop(lane, None)  # its memory goes before the next one's comes
            pieces = self._order.pieces(lane, window)
            table = joined([self._take(shard, piece) for shard, piece in pieces])
            mixed = self._order.mixed(lane, window)
            self._windows[lane] = window, table if mixed is None else table.take(pa.array(mixed))
        return self._windows[lane][1]

    def _take(self, shard: int, piece: RowSpan) -> pa.Table:
        entry = self._entries[shard]
        for again in range(FETCHED_AGAIN + 1):
            path = None if shard in self._open else self._downloader.wait_for_shard(entry, self._timeout_s)
            try:
                if path is not None:
                    pieces = self._order.pieces_of(shard, self._numbers)
                    needed = [one for one in pieces if not self._was_taken(one, piece)]
                    self._open[shard] = ShardDecoder(path, self._columns, needed, rows=entry.rows)
                return self._open[shard].take(piece)
            except (InvalidShardError, InsufficientMemoryError) as error:
                self._close(shard)
                if again and isinstance(error, InsufficientMemoryError):
                    raise  # once, a damaged file may have asked for it
                if again == FETCHED_AGAIN:
                    raise damaged_here(error.message) from error
                self._downloader.distrust(entry, error.message)
        raise AssertionError("the loop returns or raises")

    def _was_taken(self, one: RowSpan, taking: RowSpan) -> bool:
        """Of a shard that is opened again: a lane takes its rows of it from front to back."""
        if one.lane == taking.lane:
            return one.first_row < taking.first_row
        return one.window <= self._windows.get(one.lane, (-1,))[0]

    def _close(self, shard: int) -> None:
        if shard in self._open:
            self._open.pop(shard).close()


def damaged_here(why: str) -> InvalidShardError:
    """The error for a shard that was fetched again and again, each time right, and was damaged when it was read."""
    return InvalidShardError(
        f"{why}; it was fetched again {FETCHED_AGAIN} times, and what this disk gave back was wrong each time: check "
        "the disk, or give another folder"
    )


def start(downloader: StreamingDownloader, *, patient: bool, what: dict[str, Any]) -> None:
    """Start a downloader. If `patient`, wait for an earlier iteration of another process that is closing.

    Raises ShardInUseError, at once if this process has an iteration open under the same name.
    """
    began, is_told = time.monotonic(), False
    while True:
        try:
            return downloader.start()
        except ShardInUseError as error:
            waited_s = time.monotonic() - began
            if not patient or error.details.get("here") or waited_s > LEAVING_S:
                raise ShardInUseError(
                    f"an iteration over this data set is still open as reader {what['reader']!r} of run "
                    f"{what['run']!r}: delete its iterator (`del`) before the next one begins, or give the second "
                    f"data set a run= of its own ({error.message})"
                ) from None
            if waited_s > _TELL_AFTER_S and not is_told:
                is_told = True
                _log.warning("waiting for an iteration that is closing: %s", error.message)
            time.sleep(_LOOK_S)
