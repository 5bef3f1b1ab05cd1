"""StreamingShardDataset: batches of parquet rows, fetched while they are read, in one order for all readers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset, get_worker_info

from protocol.errors import InvalidParamsError
from protocol.manifest import ShardEntry
from torch_bridge.core.closing import ClosingStack
from torch_bridge.core.ranks import Ranks
from torch_bridge.shards.downloader import StreamingDownloader
from torch_bridge.shards.sources.interface import ShardSource
from torch_bridge.shards.status import StreamingStatus
from torch_bridge.streaming.order import EpochOrder, OrderSettings, ShardSpan, open_at_once
from torch_bridge.streaming.position import EpochPosition, ReaderId, ReaderPosition, continued, saved
from torch_bridge.streaming.rows import DecodedGroups, RowReader, as_arrays
from torch_bridge.streaming.settings import Buffering, Ordering
from torch_bridge.streaming.shard_rows import ShardRows, start

Transform = Callable[[dict[str, Any]], Any]


class StreamingShardDataset(IterableDataset[Any]):
    """Yields batches: use it with `DataLoader(dataset, batch_size=None, num_workers=...)`.

    `source`: where shards come from. `batch_size`: samples. `columns`: None for all. `transform`: gets a dict of numpy
    arrays (numbers) and lists (other types), and its result is yielded. `validation_shard`: its file name; it is
    fetched first, stays on disk, and is not trained on. `ranks`: this process among all; None: from torch.distributed
    or the environment, when an iteration begins. A shard is deleted when all ranks of this machine have read it. `run`:
    another name for a second data set over the same shards on this machine. `ordering` and `buffering`:
    docs/training/streaming_dataset.md.

    Raises InvalidParamsError for a shard without a row count in the manifest; while it is read, InvalidShardError for a
    file that has another row count, or cannot be read although it is as it was published.
    """

    def __init__(
        self,
        source: ShardSource,
        *,
        batch_size: int,
        seed: int = 0,
        columns: Sequence[str] | None = None,
        transform: Transform | None = None,
        validation_shard: str | None = None,
        ordering: Ordering | None = None,
        buffering: Buffering | None = None,
        ranks: Ranks | None = None,
        run: str = "default",
    ) -> None:
        self._source, self._columns, self._transform = source, columns, transform
        self._settings = OrderSettings(**asdict(ordering or Ordering()), batch_size=batch_size, seed=seed)
        self._buffering = buffering or Buffering()
        self._ranks = ranks
        self._run, self._validation = run, validation_shard
        entries = sorted(source.manifest().shards, key=lambda entry: entry.filename)
        if validation_shard and validation_shard not in {entry.filename for entry in entries}:
            raise InvalidParamsError(f"no shard {validation_shard} in the data set: name one of its files")
        self._entries = tuple(entry for entry in entries if entry.filename != validation_shard)
        self._rows = tuple(_rows(entry) for entry in self._entries)
        self._contents = {entry.filename: str(entry.content_id) for entry in self._entries}
        # In shared memory: persistent workers see set_epoch.
        self._epoch: torch.Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._position: EpochPosition | None = None
        self._loaded = False
        self._open = 0
        self._reading: StreamingDownloader | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the last `set_epoch` or loaded state."""
        return int(self._epoch)

    @property
    def ranks(self) -> Ranks:
        """As given, or as they are now. Raises InvalidParamsError as `Ranks.found` does."""
        return self._ranks or Ranks.found()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. It starts at its first batch; the epoch of a loaded state continues where that was saved.

        Workers see it when their next iteration begins, persistent ones too.
        """
        if epoch < 0:
            raise InvalidParamsError(f"epoch {epoch} must not be negative")
        if epoch != self.epoch:
            self._epoch.fill_(epoch)
            self._position, self._loaded = None, False

    def status(self) -> StreamingStatus | None:
        """Of the downloader of this process's iteration; None if there is none."""
        return self._reading.status() if self._reading else None

    def order(self, epoch: int | None = None) -> EpochOrder:
        """The order of an epoch; None: of this one."""
        return EpochOrder(self._rows, replace(self._settings, epoch=self.epoch if epoch is None else epoch))

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that this process yielded. In a worker it is that worker's own.

        After an epoch's last batch it is the end of the epoch: continued, it yields nothing, and `set_epoch` begins
        the next one.
        """
        position = self._position or EpochPosition(self.epoch)
        return saved(position.position, self._turn(), replace(self._settings, epoch=position.epoch), self._contents)

    def state_at(self, batches: int) -> dict[str, Any]:
        """The state after so many batches of this rank since the epoch began or was continued; ranks go in lock-step.

        For a plain DataLoader with workers, and to continue with other numbers of workers or ranks.
        """
        position = self._position or EpochPosition(self.epoch)
        turn, settings = ReaderId(self.ranks.rank, self.ranks.world_size), replace(self._settings, epoch=position.epoch)
        return saved(ReaderPosition(position.position.base, batches), turn, settings, self._contents)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration continues from the state; the one after it starts its epoch from the beginning.

        A state of a finished epoch does not undo a `set_epoch` to a later one. Raises InvalidParamsError if the state
        cannot be continued exactly, and says why.
        """
        turn, epoch = self._turn(), int(state["epoch"])
        position = continued(state, turn, self._settings, self._contents)
        order = self.order(epoch)
        if turn.workers == 1 and epoch < self.epoch and position.base + turn.rank >= order.end(0, 1):
            return
        self._epoch.fill_(max(epoch, self.epoch) if get_worker_info() else epoch)
        self._position, self._loaded = EpochPosition(epoch, position), True

    def validation_batches(self) -> Iterator[Any]:
        """Batches of the validation shard in its own order, the same on every rank; it is fetched if it is not here."""
        entry = next((entry for entry in self._source.manifest().shards if entry.filename == self._validation), None)
        if entry is None:
            raise InvalidParamsError("no validation shard: name its file by validation_shard=")
        groups = DecodedGroups(self._buffering.decoded_bytes)
        reader = RowReader(self._source.fetch(entry).path, self._columns, groups=groups, rows=entry.rows)
        try:
            for first in range(0, _rows(entry), self._settings.batch_size):
                end = min(first + self._settings.batch_size, _rows(entry))
                yield self._transformed(reader.take(np.arange(first, end)))
        finally:
            reader.close()

    def __iter__(self) -> Iterator[Any]:
        if self._position is None or not self._loaded:
            self._position = EpochPosition(self.epoch)
        self._loaded = False  # a state is continued once
        return self._batches(self._position, self._turn())

    def _batches(self, began: EpochPosition, turn: ReaderId) -> Iterator[Any]:
        base, own, order = began.position.base, began.position.own, self.order(began.epoch)
        numbers = order.numbers(
            base, rank=turn.rank, ranks=turn.ranks, worker=turn.worker, workers=turn.workers, skip=own
        )
        spans = order.spans(numbers)
        mine = {span.shard for span in spans}
        read = [span.shard for span in order.spans() if span.last < numbers.start and span.shard not in mine]
        never = set(range(len(self._entries))) - mine - set(read)  # those of other readers' batches
        past = [self._entries[shard] for shard in (*sorted(never), *read)]
        downloader = self._downloader(spans, past, began.epoch, turn)
        start(downloader, patient=not self._open, what={"run": self._run, "reader": _reader(turn)})
        self._open += 1
        self._reading = downloader
        rows = ShardRows(self._entries, downloader, self._columns, self._buffering)
        due = sorted(spans, key=lambda span: span.last, reverse=True)
        with ClosingStack(downloader.stop, rows.close):
            try:
                for done, batch in enumerate(order.taken(numbers), 1):
                    while due and due[-1].last < batch.number:
                        rows.past(due.pop().shard)
                    given = self._transformed(rows.table(batch))
                    self._position = EpochPosition(began.epoch, ReaderPosition(base, own + done))
                    yield given
                while due:
                    rows.past(due.pop().shard)
            finally:
                self._open -= 1
                self._reading = None

    def _transformed(self, table: pa.Table) -> Any:
        columns = as_arrays(table)
        return self._transform(columns) if self._transform else columns

    def _downloader(
        self, spans: Sequence[ShardSpan], past: Sequence[ShardEntry], epoch: int, turn: ReaderId
    ) -> StreamingDownloader:
        names = [self._entries[span.shard].filename for span in spans]
        left = [entry.filename for entry in self._source.on_disk(past)] if past else []  # left by a run that was killed
        reading = open_at_once(spans)
        kept = self._buffering
        downloader = StreamingDownloader(
            self._source,
            names,
            min_buffer=reading + 1,
            buffer_size=reading + kept.buffer_size,
            max_buffer=reading + kept.largest_buffer,
            keep_behind=kept.keep_behind,
            run=self._run,
            reader=_reader(turn),
            expected_readers=self.ranks.local_world_size * turn.workers,
            pinned=[self._validation] if self._validation else [],
            warn_free_bytes=kept.warn_free_bytes,
            stop_free_bytes=kept.stop_free_bytes,
        )
        downloader.load_state_dict({"epoch": epoch, "order": [*left, *names], "consumed": left})
        return downloader

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned for an iteration does not have its training process's torch.distributed.
        return {**self.__dict__, "_reading": None, "_ranks": self._ranks or Ranks.known()}

    def _turn(self) -> ReaderId:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return ReaderId(self.ranks.rank, self.ranks.world_size, worker, workers)


def _reader(turn: ReaderId) -> str:
    return f"rank{turn.rank}-worker{turn.worker}"


def _rows(entry: ShardEntry) -> int:
    if entry.rows is None:
        raise InvalidParamsError(f"the manifest has no row count of {entry.filename}: publish the data set again")
    return entry.rows
