"""One consumer's way through one epoch: files are fetched, handed over, recorded, deleted."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from protocol.errors import InvalidParamsError
from torch_bridge.batches.fetcher import FileFetcher
from torch_bridge.batches.folder import ConsumerFolder, read_json
from torch_bridge.batches.journal import ConsumerJournal, ConsumerPosition, Done
from torch_bridge.batches.plan import (
    FileBatch,
    RemoteFile,
    epoch_order,
    own_share,
    part_of,
    pass_order,
    plan_batches,
)
from torch_bridge.batches.settings import BatchSettings
from torch_bridge.batches.sources.interface import FileSource
from torch_bridge.batches.stats import ConsumerTimes
from torch_bridge.core.closing import ClosingStack

_log = logging.getLogger(__name__)
Decode = Callable[[Path, Any], Any]


class ConsumerEpoch:
    """Made for one epoch in the process of its consumer. `handed` is what a checkpoint has to hold."""

    def __init__(
        self,
        source: FileSource,
        folder: ConsumerFolder,
        settings: BatchSettings,
        epoch: int,
        files: list[RemoteFile],
        done: Done,
        *,
        paths_leave: bool,
    ) -> None:
        """`paths_leave`: samples are paths, which another process uses later."""
        self._settings = settings
        self._folder = folder
        self._source = source
        self._progress = ConsumerJournal(folder)
        self.epoch = epoch
        shuffle = settings.shuffle and not source.in_order
        self._shuffle = shuffle
        order = own_share(epoch_order(files, settings.seed, epoch, shuffle=shuffle), folder.consumer)
        self.handed: Done = {file: done[file] for file in order if file in done}
        self._trained = dict(self.handed)
        self._files = len(order)
        left = [file for file in order if done.get(file, 0) < settings.epochs_per_subset]
        cache_size = part_of(settings.cache_size, folder.consumer)
        if cache_size == 0:
            raise InvalidParamsError(
                f"cache_size={settings.cache_size} is divided among {folder.consumer.local_count} consumers (workers x "
                "ranks of this machine), and each needs 1 at least: raise it, or use fewer workers"
            )
        self._max_bytes = part_of(settings.max_bytes, folder.consumer)
        self._batches = plan_batches(left, cache_size, self._max_bytes)
        self._paths_leave = paths_leave
        self._unsure: deque[tuple[RemoteFile, int]] = deque()
        self._leaving: deque[tuple[FileBatch, int]] = deque()
        """Batches that are consumed, with the number of samples that had been handed over by then."""
        self._spent = ConsumerTimes()
        self._before = ConsumerTimes()
        self._samples = 0

    def samples(
        self, held: ClosingStack, decode: Decode | None, metadata_of: Callable[[RemoteFile], Any]
    ) -> Iterator[Any]:
        """Each file of the epoch, as often as a subset is repeated. Progress is recorded as they are used.

        Closing `held` ends the downloads.
        """
        known = read_json(self._folder.home / "progress.json")
        if isinstance(known, dict):
            self._before = ConsumerTimes(**known["spent"])
        self._progress.begin(self.epoch, self._trained)
        self._write(0, 0)
        settings = self._settings
        fetcher = FileFetcher(
            self._source,
            self._folder,
            self._batches,
            max_bytes=self._max_bytes,
            concurrency=settings.concurrency,
            skip_missing=settings.on_missing == "skip",
            keep_free_bytes=settings.keep_free_bytes,
        )
        held.callback(fetcher.close)
        fetcher.start()
        for batch in self._batches:
            yield from self._batch(batch, fetcher, decode, metadata_of)
            self._leaving.append((batch, self._samples))
            self._release(fetcher)
            self._log(batch, fetcher)
        self._all_trained()
        self._write(len(self._batches), 0, epoch=self.epoch + 1)
        if not self._paths_leave:
            self._release(fetcher, all_of_them=True)

    def _batch(
        self, batch: FileBatch, fetcher: FileFetcher, decode: Decode | None, metadata_of: Callable[[RemoteFile], Any]
    ) -> Iterator[Any]:
        begun = dict(self.handed)
        within = 0
        for number in range(self._settings.epochs_per_subset):
            for file in pass_order(batch.files, self._settings.seed, self.epoch, number, shuffle=self._shuffle):
                if begun.get(file, 0) > number:
                    continue
                asked = time.monotonic()
                self._release(fetcher)
                self._expect_room(batch)
                path = fetcher.wait(file)
                here = time.monotonic()
                self.handed[file] = number + 1
                if path is None:
                    self._unsure.append((file, number + 1))
                    self._spent = replace(self._spent, skipped=self._spent.skipped + (number == 0))
                    continue
                meta = metadata_of(file)
                sample = decode(path, meta) if decode is not None else (str(path), meta)
                ready = time.monotonic()
                self._samples += 1
                within += 1
                self._unsure.append((file, number + 1))
                yield sample
                spent = self._spent
                download_s, came = fetcher.measured()
                self._spent = replace(
                    spent,
                    wait_s=spent.wait_s + here - asked,
                    decode_s=spent.decode_s + ready - here,
                    train_s=spent.train_s + time.monotonic() - ready,
                    samples=self._samples,
                    download_s=download_s,
                    downloaded_bytes=came,
                )
                while len(self._unsure) > self._settings.samples_ahead:
                    self._trained_on()
                self._write(batch.number, within)

    def _trained_on(self) -> None:
        file, count = self._unsure.popleft()
        self._trained[file] = count
        self._progress.consumed(self.epoch, file, count)

    def _all_trained(self) -> None:
        while self._unsure:
            self._trained_on()

    def _release(self, fetcher: FileFetcher, *, all_of_them: bool = False) -> None:
        """Release batches that no process reads any more."""
        ahead = self._settings.samples_ahead if self._paths_leave else 0
        while self._leaving and (all_of_them or self._leaving[0][1] + ahead <= self._samples):
            fetcher.release(self._leaving.popleft()[0])

    def _expect_room(self, batch: FileBatch) -> None:
        """Raises InvalidParamsError if batches that others may still read leave no room for the next ones."""
        kept = sum(one.size for one, _ in self._leaving)
        if len(self._leaving) >= 2 or (kept and kept + batch.size > self._max_bytes):
            raise InvalidParamsError(
                f"samples_ahead={self._settings.samples_ahead} is more than batch {batch.number - 1} has samples, and "
                "batches whose paths may still be in use cannot be deleted: raise cache_size or max_bytes, lower "
                "samples_ahead, or give decode= so that no path leaves the worker"
            )

    def _write(self, subset: int, within: int, epoch: int | None = None) -> None:
        finished = sum(count >= self._settings.epochs_per_subset for count in self._trained.values())
        self._progress.at(
            ConsumerPosition(
                epoch=self.epoch if epoch is None else epoch,
                subset=subset,
                file=within,
                consumed=finished,
                of=self._files,
                seed=self._settings.seed,
                spent=_sum(self._before, self._spent),
            )
        )

    def _log(self, batch: FileBatch, fetcher: FileFetcher) -> None:
        spent = self._spent
        limit = "download" if fetcher.measured()[0] > spent.train_s + spent.decode_s else "training"
        _log.info(
            "%s: epoch %d, batch %d of %d: %d files, %d bytes; so far %.1f s of downloads, %.1f s of training, %.1f s "
            "of waiting for files: limited by %s",
            self._source.name,
            self.epoch,
            batch.number + 1,
            len(self._batches),
            len(batch.files),
            batch.size,
            fetcher.measured()[0],
            spent.train_s + spent.decode_s,
            spent.wait_s,
            limit,
        )


def _sum(one: ConsumerTimes, other: ConsumerTimes) -> ConsumerTimes:
    return ConsumerTimes(*(getattr(one, name) + getattr(other, name) for name in ConsumerTimes.__dataclass_fields__))
