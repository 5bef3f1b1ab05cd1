"""StreamingShardDataset: batches of parquet rows from shards that are on their way, in one order for all readers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from protocol.errors import InvalidParamsError, InvalidShardError
from protocol.manifest import ShardEntry
from torch_bridge.shards.downloader import StreamingDownloader
from torch_bridge.shards.source import ShardSource
from torch_bridge.streaming.order import Batch, EpochOrder, OrderSettings
from torch_bridge.streaming.position import Position, Turn, continued, saved
from torch_bridge.streaming.rows import RowReader, as_arrays

Transform = Callable[[dict[str, Any]], Any]


class StreamingShardDataset(IterableDataset[Any]):
    """Yields batches: use it with `DataLoader(dataset, batch_size=None, num_workers=...)`.

    `source`: where shards come from. `columns`: None for all. `transform`: gets a dict of numpy arrays (numbers) and
    lists (all else), and what it returns is yielded. `rank`, `world_size`: those of torch.distributed, or of the
    environment, where not given. `local_world_size`: ranks on this machine; a shard is deleted when all have read it.
    `validation_shard`: its file name; it is fetched first, stays on disk, and is not trained on. `lanes`: see
    docs/training/streaming_dataset.md. Raises InvalidParamsError for a shard whose rows the manifest does not tell.
    """

    def __init__(
        self, source: ShardSource, *, batch_size: int, columns: Sequence[str] | None = None, seed: int = 0,
        shuffle: bool = True, window: int = 8192, lanes: int = 8, block_rows: int = 1024,
        transform: Transform | None = None, rank: int | None = None, world_size: int | None = None,
        local_world_size: int | None = None, buffer_size: int = 3, keep_behind: int = 0, drop_last: bool = False,
        validation_shard: str | None = None, run: str = "default", shard_timeout_s: float | None = None,
    ) -> None:  # fmt: skip
        self._source, self._columns, self._transform = source, columns, transform
        self._settings = OrderSettings(batch_size, seed, 0, shuffle, lanes, block_rows, window, drop_last)
        self._rank, self._ranks = _ranks(rank, world_size)
        self._local_ranks = local_world_size or int(os.environ.get("LOCAL_WORLD_SIZE", self._ranks))
        self._buffer_size, self._keep_behind, self._run = buffer_size, keep_behind, run
        self._validation, self._shard_timeout_s = validation_shard, shard_timeout_s
        entries = sorted(source.manifest().shards, key=lambda entry: entry.filename)
        if validation_shard and validation_shard not in {entry.filename for entry in entries}:
            raise InvalidParamsError(f"no shard {validation_shard} in the data set: name one of its files")
        self._entries = tuple(entry for entry in entries if entry.filename != validation_shard)
        self._rows = tuple(_rows(entry) for entry in self._entries)
        self._contents = {entry.filename: str(entry.content_id) for entry in self._entries}
        self._position = Position()

    def set_epoch(self, epoch: int) -> None:
        """Another epoch starts at its first batch; the same one goes on where it is."""
        if epoch != self._settings.epoch:
            self._settings, self._position = replace(self._settings, epoch=epoch), Position()

    def order(self) -> EpochOrder:
        """The order of the epoch."""
        return EpochOrder(self._rows, self._settings)

    def state_dict(self) -> dict[str, Any]:
        """After the batch that this process was given last. In a worker it is that worker's own."""
        return saved(self._position, self._turn(), self._settings, self._contents)

    def state_at(self, batches: int) -> dict[str, Any]:
        """After so many batches that this rank took since the epoch began or was continued; ranks go in lock-step.

        For a plain DataLoader with workers, and to continue with other numbers of workers or ranks.
        """
        turn = Turn(self._rank, self._ranks)
        return saved(Position(self._position.base, batches), turn, self._settings, self._contents)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises InvalidParamsError where the state cannot be continued exactly, and says why."""
        self._position = continued(state, self._turn(), self._settings, self._contents)
        self._settings = replace(self._settings, epoch=int(state["epoch"]))

    def __iter__(self) -> Iterator[Any]:
        turn, order, began = self._turn(), self.order(), self._position
        following = began.base + turn.rank + turn.ranks * (turn.worker + turn.workers * began.own)
        spans = [span for span in order.spans() if span.last >= following]
        names = [self._entries[span.shard].filename for span in spans]
        downloader = StreamingDownloader(
            self._source, names, buffer_size=self._buffer_size, keep_behind=self._keep_behind, run=self._run,
            max_buffer=max(16, self._buffer_size), reader=f"rank{turn.rank}-worker{turn.worker}",
            expected_readers=self._local_ranks * turn.workers, pinned=[self._validation] if self._validation else [],
        )  # fmt: skip
        due = sorted(spans, key=lambda span: span.last)
        readers: dict[int, RowReader] = {}
        with downloader:
            try:
                batches = order.taken_by(
                    began.base, rank=turn.rank, ranks=turn.ranks, worker=turn.worker, workers=turn.workers,
                    skip=began.own,
                )  # fmt: skip
                for done, batch in enumerate(batches, 1):
                    while due and due[0].last < batch.number:
                        self._leave(due.pop(0).shard, readers, downloader)
                    columns = as_arrays(self._table(batch, readers, downloader))
                    self._position = Position(began.base, began.own + done)
                    yield self._transform(columns) if self._transform else columns
                for span in due:
                    self._leave(span.shard, readers, downloader)
            finally:
                for reader in readers.values():
                    reader.close()
        self._position = Position()

    def _table(self, batch: Batch, readers: dict[int, RowReader], downloader: StreamingDownloader) -> pa.Table:
        parts, places = [], []
        for shard in np.unique(batch.shards).tolist():
            mine = np.flatnonzero(batch.shards == shard)
            parts.append(self._take(shard, batch.rows[mine], readers, downloader))
            places.append(mine)
        if len(parts) == 1:
            return parts[0]
        return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(places))))

    def _take(self, shard: int, rows: Any, readers: dict[int, RowReader], downloader: StreamingDownloader) -> pa.Table:
        entry = self._entries[shard]
        try:
            if shard not in readers:
                path = downloader.wait_for_shard(entry, self._shard_timeout_s)
                readers[shard] = RowReader(path, self._columns)
            return readers[shard].take(rows)
        except InvalidShardError as error:
            self._source.distrust(entry, str(error))
            if shard in readers:
                readers.pop(shard).close()
            readers[shard] = RowReader(Path(self._source.fetch(entry).path), self._columns)
            return readers[shard].take(rows)

    def _leave(self, shard: int, readers: dict[int, RowReader], downloader: StreamingDownloader) -> None:
        if shard in readers:
            readers.pop(shard).close()
        downloader.consumed(self._entries[shard])

    def _turn(self) -> Turn:
        info = get_worker_info()
        return Turn(self._rank, self._ranks, info.id, info.num_workers) if info else Turn(self._rank, self._ranks)


def _rows(entry: ShardEntry) -> int:
    if entry.rows is None:
        raise InvalidParamsError(f"the manifest does not tell the rows of {entry.filename}: publish the data set again")
    return entry.rows


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise InvalidParamsError(f"give both rank and world_size, or neither: got {rank} and {world_size}")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world_size:
        raise InvalidParamsError(f"rank {rank} of {world_size}: it must lie in [0, {world_size})")
    return rank, world_size
