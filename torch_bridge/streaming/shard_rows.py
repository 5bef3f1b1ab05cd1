"""The rows of the shards that one iteration reads: it waits for a shard, opens it, fetches a damaged one again."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from protocol.errors import InvalidShardError, ShardInUseError
from protocol.manifest import ShardEntry
from torch_bridge.shards.downloader import StreamingDownloader
from torch_bridge.shards.readers import LEAVING_S
from torch_bridge.streaming.order import Indices, SampleBatch
from torch_bridge.streaming.rows import DecodedGroups, RowReader, assembled
from torch_bridge.streaming.settings import Buffering

_log = logging.getLogger(__name__)
_LOOK_S = 0.1
_TELL_AFTER_S = 2.0
_FETCHED_AGAIN = 3
"""How often one shard is fetched again in an iteration, on a disk that damages it each time."""


class ShardRows:
    """Not thread-safe. The shards of a batch are indices in `entries`."""

    def __init__(
        self,
        entries: Sequence[ShardEntry],
        downloader: StreamingDownloader,
        columns: Sequence[str] | None,
        buffering: Buffering,
    ) -> None:
        self._entries, self._downloader = entries, downloader
        self._columns, self._timeout_s = columns, buffering.shard_timeout_s
        self._groups = DecodedGroups(buffering.decoded_bytes)
        self._open: dict[int, RowReader] = {}

    def table(self, batch: SampleBatch) -> pa.Table:
        """The batch's rows in its order. Raises as `wait_for_shard` for a shard that does not come."""
        parts, positions = [], []
        for shard in sorted(set(batch.shards.tolist())):
            mine = np.flatnonzero(batch.shards == shard)
            parts.append(self._take(shard, batch.rows[mine]))
            positions.append(mine)
        return assembled(parts, positions)

    def past(self, shard: int) -> None:
        """This iteration reads no more rows of the shard."""
        self._close(shard)
        self._downloader.consumed(self._entries[shard])

    def close(self) -> None:
        for shard in list(self._open):
            self._close(shard)

    def _take(self, shard: int, rows: Indices) -> pa.Table:
        entry = self._entries[shard]
        for again in range(_FETCHED_AGAIN + 1):
            path = None if shard in self._open else self._downloader.wait_for_shard(entry, self._timeout_s)
            try:
                if path is not None:
                    self._open[shard] = RowReader(path, self._columns, groups=self._groups, rows=entry.rows)
                return self._open[shard].take(rows)
            except InvalidShardError as error:
                self._close(shard)
                if again == _FETCHED_AGAIN:
                    raise
                self._downloader.distrust(entry, error.message)
        raise AssertionError("the loop returns or raises")

    def _close(self, shard: int) -> None:
        if shard in self._open:
            self._open.pop(shard).close()


def start(downloader: StreamingDownloader, *, patient: bool, what: dict[str, Any]) -> None:
    """Start a downloader. If `patient`, wait for an earlier iteration that is closing. Raises ShardInUseError."""
    began, is_told = time.monotonic(), False
    while True:
        try:
            return downloader.start()
        except ShardInUseError as error:
            waited_s = time.monotonic() - began
            if not patient or waited_s > LEAVING_S:
                raise ShardInUseError(
                    f"an iteration over this data set is still open as reader {what['reader']!r} of run "
                    f"{what['run']!r}: delete its iterator (`del`) before the next one begins, or give the second "
                    f"data set a run= of its own ({error.message})"
                ) from None
            if waited_s > _TELL_AFTER_S and not is_told:
                is_told = True
                _log.warning("waiting for an iteration that is closing: %s", error.message)
            time.sleep(_LOOK_S)
