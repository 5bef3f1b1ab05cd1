"""StreamingShardDataset: batches of parquet rows, fetched while they are read, in one order for all readers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any, Literal

import pyarrow as pa
from torch.utils.data import IterableDataset, get_worker_info

from protocol.errors import InvalidParamsError, InvalidShardError
from protocol.manifest import ShardEntry
from torch_bridge.core.closing import ClosingStack
from torch_bridge.core.ranks import Ranks, check_not_split_again
from torch_bridge.core.workers import end_with_trainer
from torch_bridge.shards.disk_limit import SharedOrder
from torch_bridge.shards.downloader import StreamingDownloader
from torch_bridge.shards.shard_file import as_published
from torch_bridge.shards.sources.interface import ShardSource
from torch_bridge.shards.status import StreamingStatus
from torch_bridge.streaming.disk_needs import DiskNeeds, LocalReaders, epochs_ahead
from torch_bridge.streaming.epoch import SharedEpoch
from torch_bridge.streaming.order import EpochOrder, OrderSettings, RowSpan, ShardSpan, open_at_once
from torch_bridge.streaming.position import EpochPosition, ReaderId, ReaderPosition, continued, saved
from torch_bridge.streaming.rows import ShardDecoder
from torch_bridge.streaming.schema import DataColumns, as_arrays
from torch_bridge.streaming.settings import Buffering, Ordering
from torch_bridge.streaming.shard_rows import FETCHED_AGAIN, ShardRows, damaged_here, start

_log = logging.getLogger(__name__)
Transform = Callable[[dict[str, Any]], Any]


class StreamingShardDataset(IterableDataset[Any]):
    """Yields batches: use it with `DataLoader(dataset, batch_size=None, num_workers=...)`.

    `source`: where shards come from. `batch_size`: samples. `columns`: None for all. `nulls`: what stands for a missing
    value, by column; without it NaN in floats, an error in other arrays, None in lists. `transform`: gets a dict of
    numpy arrays and lists (see `as_arrays`), and its result is yielded. `validation_shard`: its file name; it is
    fetched first, stays on disk, and is not trained on. `ranks`: this process among all; None: from torch.distributed
    or the environment, when an iteration begins. A shard is deleted when all ranks of this machine have read it. `run`:
    another name for a second data set over the same shards on this machine. `disk_limit`: bytes, or "10gb", that all
    readers of this machine together may have on disk. `ordering` and `buffering`: docs/training/streaming_dataset.md.

    Raises InvalidParamsError for a shard without a row count in the manifest, and, when an iteration begins, for a
    `disk_limit` below what its readers must have on disk at once, with what would fit. While it is read, raises
    InvalidShardError for a file that has another row count, or cannot be read although it is as it was published.
    """

    def __init__(
        self,
        source: ShardSource,
        *,
        batch_size: int,
        seed: int = 0,
        columns: Sequence[str] | None = None,
        nulls: Mapping[str, Any] | None = None,
        transform: Transform | None = None,
        validation_shard: str | None = None,
        ordering: Ordering | None = None,
        buffering: Buffering | None = None,
        ranks: Ranks | None = None,
        run: str = "default",
        disk_limit: int | str | None = None,
    ) -> None:
        self._source, self._columns, self._transform = source, DataColumns(columns, nulls), transform
        self._buffering = buffering or Buffering()
        if disk_limit is not None:
            if self._buffering.disk_limit is not None:
                raise InvalidParamsError("disk_limit was given twice: here, and in buffering=Buffering(disk_limit=...)")
            self._buffering = replace(self._buffering, disk_limit=disk_limit)
        self._ranks = ranks
        self._run, self._validation = run, validation_shard
        entries = sorted(source.manifest().shards, key=lambda entry: entry.filename)
        if validation_shard and validation_shard not in {entry.filename for entry in entries}:
            raise InvalidParamsError(f"no shard {validation_shard} in the data set: name one of its files")
        self._entries = tuple(entry for entry in entries if entry.filename != validation_shard)
        self._rows = tuple(_rows(entry) for entry in self._entries)
        ordering = ordering or Ordering()
        size_bytes = sum(entry.size for entry in self._entries)
        block_rows, window = ordering.fitted(size_bytes / max(1, sum(self._rows)))
        fitted = asdict(ordering) | {"block_rows": block_rows, "window": window}
        self._settings = OrderSettings(**fitted, batch_size=batch_size, seed=seed)
        self._contents = {entry.filename: str(entry.content_id) for entry in self._entries}
        self._shared = SharedEpoch()
        self._order: EpochOrder | None = None
        """The last one that was asked for."""
        self._position: EpochPosition | None = None
        self._loaded = 0
        """The number of a loaded state; 0: none."""
        self._read: Literal["", "mine", "all"] = ""
        """Of a loaded state: whether this reader, or all of them, had read their epoch."""
        self._open = 0
        self._reading: StreamingDownloader | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the last iteration, `set_epoch` or loaded state."""
        return self._shared.number

    def __len__(self) -> int:
        """Batches of this rank in this epoch, from its beginning. It may differ by a few from epoch to epoch."""
        ranks = self.ranks
        return len(self.order().numbers(0, rank=ranks.rank, ranks=ranks.world_size, worker=0, workers=1))

    @property
    def ranks(self) -> Ranks:
        """As given, or as they are now. Raises InvalidParamsError as `Ranks.found` does."""
        return self._ranks or Ranks.found()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch. It starts at its first batch; the epoch of a loaded state continues where that was saved.

        Without it, epochs follow each other: one that was read to its end is followed by the next, one that was left
        begins again. Workers see it when their next iteration begins, persistent ones too.
        """
        if epoch < 0:
            raise InvalidParamsError(f"epoch {epoch} must not be negative")
        check_not_split_again(self, self._ranks)
        if epoch != self.epoch:
            self._position, self._loaded = None, 0
        self._shared.choose(epoch)

    def status(self) -> StreamingStatus | None:
        """Of the downloader of this process's iteration; None if there is none."""
        return self._reading.status() if self._reading else None

    def order(self, epoch: int | None = None) -> EpochOrder:
        """The order of an epoch; None: of this one."""
        number = self.epoch if epoch is None else epoch
        if self._order is None or self._order.settings.epoch != number:
            self._order = EpochOrder(self._rows, replace(self._settings, epoch=number))
        return self._order

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that this process yielded. In a worker it is that worker's own.

        After an epoch's last batch it is the end of the epoch: continued, the next epoch begins, or nothing is yielded
        if `set_epoch` chose the same epoch.
        """
        return self._saved(self._position or EpochPosition(self.epoch), self._turn())

    def state_at(self, batches: int) -> dict[str, Any]:
        """The state after so many batches of this rank since the epoch began or was continued; ranks go in lock-step.

        For a plain DataLoader with workers, and to continue with other numbers of workers or ranks.
        """
        began = EpochPosition(self.epoch, ReaderPosition(self._shared.base))
        if self._loaded and self._position is not None and not self._shared.is_taken(self._loaded):
            began = self._position
        turn = ReaderId(self.ranks.rank, self.ranks.world_size)
        return self._saved(EpochPosition(began.epoch, ReaderPosition(began.position.base, batches)), turn)

    def _saved(self, at: EpochPosition, turn: ReaderId) -> dict[str, Any]:
        order = self.order(at.epoch)
        finished = not self._numbers(order, at.position, turn)
        return saved(at.position, turn, order.settings, self._contents, finished=finished)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration continues from the state, or, if its epoch was read, begins the next one; the one after it
        starts its epoch from the beginning.

        A state of a finished epoch does not undo a `set_epoch` to a later one. Raises InvalidParamsError if the state
        cannot be continued exactly, and says why.
        """
        turn, epoch = self._turn(), int(state["epoch"])
        position = continued(state, turn, self._settings, self._contents)
        order = self.order(epoch)
        read = not self._numbers(order, position, turn)
        if read and state["workers"] == 1 and position.base < order.end(position.base, turn.ranks):
            # Others have one more batch. At an epoch's end a rank that had none more saved so; in the middle it waits.
            read = state["ranks"] == turn.ranks and bool(state.get("finished", True))
        loaded, chosen = self._shared.load(turn.worker, finished=read), self._shared.chosen
        if get_worker_info() is None:
            self._shared.continue_at(epoch if chosen is None or not read else max(epoch, chosen))
        self._position, self._loaded = EpochPosition(epoch, position), loaded
        self._read = "" if not read else "all" if turn.workers == 1 else "mine"
        if read and chosen is not None and chosen > epoch:
            self._position, self._read = self._after(self._position, turn, chosen), ""

    @staticmethod
    def _numbers(order: EpochOrder, position: ReaderPosition, turn: ReaderId) -> range:
        worker = (turn.worker - position.first_worker) % turn.workers
        return order.numbers(
            position.base, rank=turn.rank, ranks=turn.ranks, worker=worker, workers=turn.workers, skip=position.own
        )

    def _after(self, read: EpochPosition, turn: ReaderId, epoch: int) -> EpochPosition:
        """The beginning of another epoch, after one that all workers have read."""
        base = read.position.base
        given = self.order(read.epoch).numbers(base, rank=turn.rank, ranks=turn.ranks, worker=0, workers=1)
        first = (read.position.first_worker + len(given)) % turn.workers
        return EpochPosition(epoch, ReaderPosition(first_worker=first))

    def validation_batches(self) -> Iterator[Any]:
        """Batches of the validation shard in its own order, the same on every rank; it is fetched if it is not here."""
        entry = next((entry for entry in self._source.manifest().shards if entry.filename == self._validation), None)
        if entry is None:
            raise InvalidParamsError("no validation shard: name its file by validation_shard=")
        rows, size = _rows(entry), self._settings.batch_size
        batches = [RowSpan(first, min(size, rows - first), 0, first // size) for first in range(0, rows, size)]
        for again in range(FETCHED_AGAIN + 1):
            path = self._source.fetch(entry).path
            try:
                with closing(ShardDecoder(path, self._columns, batches, rows=rows)) as decoder:
                    while batches:
                        given = self._transformed(decoder.take(batches[0]))
                        del batches[0]
                        yield given
                return
            except InvalidShardError as error:
                if again == FETCHED_AGAIN:
                    raise damaged_here(error.message) from error
                if not self._source.distrust(entry, error.message):
                    raise as_published(entry, error.message) from error

    def __iter__(self) -> Iterator[Any]:
        end_with_trainer()
        check_not_split_again(self, self._ranks)
        turn = self._turn()
        if self._position is None or not self._shared.take(self._loaded, turn.worker):
            self._position = EpochPosition(self._shared.begin(turn.worker, turn.workers))
        else:
            if self._read == "all" or (self._read == "mine" and self._shared.all_finished(turn.workers)):
                if self._shared.chosen is None:
                    self._position = self._after(self._position, turn, self._position.epoch + 1)
                else:
                    self._shared.leave_nothing()
            self._shared.begin(turn.worker, turn.workers, self._position.epoch, self._position.position.base)
        if self._shared.nothing_left:
            epoch = self._position.epoch
            _log.warning(
                "epoch %d had been read when the loaded state was saved, and set_epoch(%d) chose it again: it yields "
                "nothing more, and set_epoch(%d) begins the next",
                epoch,
                epoch,
                epoch + 1,
            )
            self._position = EpochPosition(epoch, ReaderPosition(self.order(epoch).end(0, turn.ranks)))
        self._check_not_empty(self.order(self._position.epoch), turn)
        return self._batches(self._position, turn)

    def _check_not_empty(self, order: EpochOrder, turn: ReaderId) -> None:
        """Warn once if this rank has no batch in an epoch, and others have. Raises InvalidParamsError if none has."""
        if order.numbers(0, rank=turn.rank, ranks=turn.ranks, worker=0, workers=1):
            return
        epoch, settings = order.settings.epoch, order.settings
        made = (
            f"{sum(self._rows)} samples in {settings.lanes} lanes make {order.batches} batches of {settings.batch_size}"
        )
        if not order.end(0, turn.ranks):
            dropped = " without those that are smaller" if settings.drop_last else ""
            raise InvalidParamsError(
                f"epoch {epoch} has no batch for each of {turn.ranks} ranks: {made}{dropped}; lower batch_size= or "
                "Ordering(lanes=), set drop_last=False, or use fewer ranks"
            )
        if turn.worker == 0 and self._shared.tell_once():
            _log.warning(
                "rank %d of %d gets no batch in epoch %d: %s; under DistributedDataParallel the other ranks wait for "
                "this one for ever: lower batch_size=, or use fewer ranks",
                turn.rank,
                turn.ranks,
                epoch,
                made,
            )

    def _batches(self, began: EpochPosition, turn: ReaderId) -> Iterator[Any]:
        order = self.order(began.epoch)
        numbers = self._numbers(order, began.position, turn)
        if not numbers:
            self._shared.finish(turn.worker, began.epoch)
        spans = order.spans(numbers)
        mine = {span.shard for span in spans}
        read = [span.shard for span in order.spans() if span.last < numbers.start and span.shard not in mine]
        never = set(range(len(self._entries))) - mine - set(read)  # those of other readers' batches
        past = [self._entries[shard] for shard in (*sorted(never), *read)]
        if self._buffering.disk_limit is not None:
            spans = order.decoded(numbers)
        downloader = self._downloader(spans, past, began, turn)
        start(downloader, patient=not self._open, what={"run": self._run, "reader": _reader(turn)})
        self._open += 1
        self._reading = downloader
        rows = ShardRows(self._entries, downloader, self._columns, order, numbers, self._buffering.shard_timeout_s)
        due, at = sorted(spans, key=lambda span: span.last, reverse=True), began.position
        with ClosingStack(downloader.stop, rows.close):
            try:
                for done, number in enumerate(numbers, 1):
                    while due and due[-1].last < number:
                        rows.past(due.pop().shard)
                    table = rows.table(number)
                    while self._buffering.disk_limit is not None and due and due[-1].last <= number:
                        rows.past(due.pop().shard)  # all its rows are decoded
                    given = self._transformed(table)
                    self._position = EpochPosition(began.epoch, ReaderPosition(at.base, at.own + done, at.first_worker))
                    if done == len(numbers):
                        self._shared.finish(turn.worker, began.epoch)
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
        self, spans: Sequence[ShardSpan], past: Sequence[ShardEntry], began: EpochPosition, turn: ReaderId
    ) -> StreamingDownloader:
        names = [self._entries[span.shard].filename for span in spans]
        left = [entry.filename for entry in self._source.on_disk(past)] if past else []  # left by a run that was killed
        reading = open_at_once(spans)
        kept = self._buffering
        shared = None if kept.disk_limit is None else self._shared_order(spans, began, turn)
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
            disk_limit=kept.disk_limit,
            shared_order=shared,
        )
        downloader.load_state_dict({"epoch": began.epoch, "order": [*left, *names], "consumed": left})
        return downloader

    def _shared_order(self, spans: Sequence[ShardSpan], began: EpochPosition, turn: ReaderId) -> SharedOrder:
        """What all readers of this machine have to read; the same for each of them."""
        sizes = [entry.size for entry in self._entries]
        costs = [self._source.cost_bytes(size) for size in sizes]
        order = self.order(began.epoch)
        needs = DiskNeeds(
            order,
            sizes,
            self._source.cost_bytes,
            LocalReaders(self.ranks, turn.workers),
            began.position.base,
            epochs_ahead(order),
        )
        together = needs.spans()
        round_ = turn.ranks * turn.workers
        since = began.position.base + round_ * max(began.position.own - 1, 0)  # no reader begins before it
        return SharedOrder(
            [self._entries[span.shard].filename for span in together if span.last >= since],
            needs.together_bytes(),
            open_at_once(spans, costs),
            needs.advice,
        )

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned for an iteration does not have its training process's torch.distributed.
        return {**self.__dict__, "_reading": None, "_order": None, "_ranks": self._ranks or Ranks.known()}

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
