"""StreamingBatchDataset: large files (such as videos) in batches that are fetched, used and deleted."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import IterableDataset, get_worker_info

from protocol.errors import InvalidParamsError
from torch_bridge.batches.consumer_epoch import ConsumerEpoch, Decode
from torch_bridge.batches.folder import ConsumerFolder
from torch_bridge.batches.journal import ConsumerJournal, Done, lowest_epoch, positions, read_state, state_of
from torch_bridge.batches.metadata import Metadata, MetadataOf, Records
from torch_bridge.batches.plan import Consumer, RemoteFile
from torch_bridge.batches.settings import BatchSettings, consumer_of
from torch_bridge.batches.sources.hub import HubFiles
from torch_bridge.batches.sources.interface import FileSource
from torch_bridge.batches.sources.origin import OriginFiles
from torch_bridge.batches.stats import TimeReport, time_report
from torch_bridge.core.client import O3Client
from torch_bridge.core.closing import ClosingStack
from torch_bridge.core.ranks import Ranks, check_not_split_again
from torch_bridge.core.sizes import byte_count
from torch_bridge.core.store import Store
from torch_bridge.core.workers import end_with_trainer

_log = logging.getLogger(__name__)
_inherited: list[Generator[Any, None, None]] = []


class StreamingBatchDataset(IterableDataset[Any]):
    """Files that are larger together than the disk, as samples.

    videos = StreamingBatchDataset(O3Client().bucket("videos", "train"), "cache", cache_size=64, max_bytes="20gb",
                                   metadata="captions.jsonl", decode=read_frames)
    for epoch in range(3):
        videos.set_epoch(epoch)
        for frames, caption in DataLoader(videos, num_workers=2, batch_size=None): ...

    A sample is the result of `decode(path, metadata)`, or (path, metadata). One iteration is one epoch: the files in an
    order that follows from seed and epoch, batch after batch; with `epochs_per_subset=E` each batch is used E times
    before the next, each time in another order.

    Each worker of each rank is a consumer: it takes every n-th file of the epoch, fetches and deletes it, so that no
    file is downloaded twice. `cache_size` and `max_bytes` are for the machine and divided among its consumers. The
    ranks come from torch.distributed or the environment of torchrun, when an iteration begins.

    Consumed files are recorded in the cache folder after every sample; a new process continues after the last sample
    that was followed by a request for another. `epoch` is the epoch of an interrupted run; a finished epoch yields
    nothing. With workers, samples wait in the loader's queues: `samples_ahead` says how many at most, for each worker
    ((prefetch_factor + 1) x batch_size; 3 x batch_size by default), and as many are yielded again after a crash. It is
    needed if paths leave a worker, so that none is deleted before it is used. StatefulDataLoader resumes exactly with
    workers too, by `state_dict`.
    """

    def __init__(
        self,
        source: FileSource | Store | str,
        cache_dir: Path | str,
        *,
        cache_size: int,
        max_bytes: int | str,
        epochs_per_subset: int = 1,
        metadata: Metadata = None,
        metadata_column: str | None = None,
        metadata_records: Records = "one",
        decode: Decode | None = None,
        seed: int = 0,
        shuffle: bool = True,
        samples_ahead: int = 0,
        concurrency: int = 4,
        on_missing: Literal["error", "skip"] = "error",
        keep_free_bytes: int | str = "100mb",
        ranks: Ranks | None = None,
        client: O3Client | None = None,
    ) -> None:
        """`source`: a URL, reached by `client`; a Store; or OriginFiles, HubFiles, ArchiveFiles, SwarmFiles.
        `cache_dir` belongs to this data set on this machine. Nothing is fetched before the first sample.
        `metadata_records="list"`: a file's metadata is the list of its records, one or more; else two are an error.

        Raises InvalidParamsError for a setting out of its range.
        """
        super().__init__()
        if isinstance(source, str):
            source = (client or O3Client()).at(source)
        self.source: FileSource = _files_of(source) if isinstance(source, Store) else source
        self.folder = Path(cache_dir)
        self.settings = BatchSettings(
            cache_size=cache_size,
            max_bytes=byte_count(max_bytes),
            epochs_per_subset=epochs_per_subset,
            seed=seed,
            shuffle=shuffle,
            samples_ahead=samples_ahead,
            concurrency=concurrency,
            on_missing=on_missing,
            keep_free_bytes=byte_count(keep_free_bytes),
        )
        self._metadata = MetadataOf(metadata, metadata_column, metadata_records)
        self._decode = decode
        self._ranks = ranks
        self._epoch: int | None = None
        self._given: tuple[int, Done] | None = None
        self._session: ConsumerEpoch | None = None
        self._running: tuple[int, Generator[Any, None, None]] | None = None

    @property
    def epoch(self) -> int:
        """The epoch that comes next, or is unfinished: a loop begins with it after a crash."""
        if self._given is not None:
            return self._given[0]
        return lowest_epoch(self.folder)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iterations. Without it they take one unfinished epoch after the other."""
        check_not_split_again(self, self._ranks)
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        end_with_trainer()
        check_not_split_again(self, self._ranks)
        if self._running is not None:
            if self._running[0] == os.getpid():
                self._running[1].close()
            else:  # its parent's, which continues with it: this process must not close it
                _inherited.append(self._running[1])
        steps = self._samples()
        self._running = os.getpid(), steps
        return steps

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: the epoch, and the files of this consumer that were handed over in it."""
        if self._session is not None:
            return state_of(self._session.epoch, self.settings.seed, self._session.handed)
        if self._given is not None:
            return state_of(self._given[0], self.settings.seed, self._given[1])
        return state_of(self.epoch, self.settings.seed, {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration continues from the state, whatever the cache folder says. A state that `merge_states` made
        of all consumers' fits any number of them. Raises InvalidParamsError for a state of another seed.
        """
        self._given = read_state(state, self.settings.seed)
        self._session = None

    def report(self) -> TimeReport:
        """Where the time of this machine's consumers went, and what limits them. Of all runs in this folder."""
        return time_report([one.spent for one in positions(self.folder)], self.settings.epochs_per_subset)

    def _samples(self) -> Generator[Any, None, None]:
        worker = get_worker_info() is not None
        leave = worker and self._decode is None
        if leave and self.settings.samples_ahead == 0:
            raise InvalidParamsError(
                "paths would leave the worker, which deletes the files while the training process still reads them: "
                "give decode=, or samples_ahead=(prefetch_factor + 1) x batch_size"
            )
        used_for: dict[str, str | int] = {"source": self.source.name, "seed": self.settings.seed}
        folder = ConsumerFolder(self.folder, consumer_of(self._ranks or Ranks.found()), used_for)
        with ClosingStack() as held:
            held.enter_context(folder.held())
            progress = ConsumerJournal(folder)
            unfinished = progress.first_epoch()
            given, self._given = self._given, None
            epoch = given[0] if given else unfinished if self._epoch is None else self._epoch
            if given is None and epoch < unfinished:
                _log.warning(
                    "%s: epoch %d is finished, as %s says; the next is %d: an empty cache_dir begins at 0",
                    self.source.name,
                    epoch,
                    folder.home / "progress.json",
                    unfinished,
                )
                return
            with folder.common_lock():
                self._metadata.load(self.source, folder.notes)
            files = progress.listing(epoch, lambda: self._listed(folder.notes))
            self._warn_of_no_file(len(files), folder.consumer, epoch)
            self._session = ConsumerEpoch(
                self.source,
                folder,
                self.settings,
                epoch,
                files,
                given[1] if given else progress.done(epoch),
                paths_leave=leave,
            )
            yield from self._session.samples(held, self._decode, self._metadata)

    def _warn_of_no_file(self, files: int, consumer: Consumer, epoch: int) -> None:
        """Once a rank and epoch, if all workers of this rank go without."""
        info, ranks = get_worker_info(), self._ranks or Ranks.found()
        if (info is None or info.id == 0) and consumer.index >= files:
            _log.warning(
                "rank %d of %d gets no file in epoch %d: %s has %d files for %d consumers (ranks x workers); under "
                "DistributedDataParallel the other ranks wait for this one for ever: use fewer ranks or workers",
                ranks.rank,
                ranks.world_size,
                epoch,
                self.source.name,
                files,
                consumer.count,
            )

    def _listed(self, notes: Path) -> list[RemoteFile]:
        found = dict.fromkeys(self.source.list(notes))
        files = [file for file in found if file.key != self._metadata.at_source]
        if not files:
            raise InvalidParamsError(f"{self.source.name}: it has no files: check the URL, its prefix and the suffixes")
        return files

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned for an iteration does not have its training process's torch.distributed.
        return self.__dict__ | {"_running": None, "_session": None, "_ranks": self._ranks or Ranks.known()}


def _files_of(store: Store) -> FileSource:
    return HubFiles(store) if store.url.startswith("hf://") else OriginFiles(store)
