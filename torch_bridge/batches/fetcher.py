"""The threads that fetch a consumer's files in their order: at most two batches, at most `max_bytes`."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from protocol.errors import CancelledRequestError, InsufficientDiskError, OriginCorruptError
from torch_bridge.batches.folder import ConsumerFolder, writing
from torch_bridge.batches.plan import FileBatch, RemoteFile
from torch_bridge.batches.sources.interface import FileSource, vanished
from torch_bridge.core.loop_thread import ServingThread

_log = logging.getLogger(__name__)
_LOOK_S = 0.5
"""Seconds between two checks of a waiting consumer for an error."""


class FileFetcher:
    """Files ahead of one consumer. `start` it, `wait` for files in the order of the batches, `release` each batch."""

    def __init__(
        self,
        source: FileSource,
        folder: ConsumerFolder,
        batches: Sequence[FileBatch],
        *,
        max_bytes: int,
        concurrency: int,
        skip_missing: bool,
        keep_free_bytes: int,
    ) -> None:
        """`concurrency` files come at once."""
        self._source = source
        self._folder = folder
        self._batches = batches
        self._max_bytes = max_bytes
        self._skip_missing = skip_missing
        self._keep_free_bytes = keep_free_bytes
        # Daemons, not a pool: a worker's process would wait at its end for a pool's downloads.
        self._threads = [
            ServingThread(self._bring_all, f"torch_bridge-batches-{number}")
            for number in range(1 if source.in_order else concurrency)
        ]
        self._files = [(batch.number, file) for batch in batches for file in batch.files]
        self._next = 0
        self._change = threading.Condition()
        self._stop = threading.Event()
        self._here: dict[RemoteFile, Path | None] = {}
        self._released = 0
        self._on_disk = 0
        self._error: Exception | None = None
        self._coming: set[RemoteFile] = set()
        self._busy_since = 0.0
        self._download_s = 0.0
        self._bytes = 0

    def start(self) -> None:
        """Make room and start."""
        expected, size = set[str](), 0
        for file in (file for batch in self._batches[:2] for file in batch.files):
            size += file.size
            if size <= self._max_bytes:
                expected.add(file.identity)
        self._folder.keep_only(expected)
        for thread in self._threads:
            thread.start()

    def wait(self, file: RemoteFile) -> Path | None:
        """Wait for a file. Returns its path; None if it has vanished and may be skipped.

        Raises the error of its fetch; InsufficientDiskError for a full disk.
        """
        with self._change:
            while file not in self._here:
                if self._error is not None:
                    raise self._error
                self._change.wait(_LOOK_S)
            return self._here[file]

    def release(self, batch: FileBatch, *, delete: bool = True) -> None:
        """Delete a batch, so that the next but one may come."""
        for file in batch.files if delete else ():
            self._source.release(file)
            self._folder.delete(file)
        with self._change:
            self._released = max(self._released, batch.number + 1)
            self._on_disk -= batch.size
            for file in batch.files:
                self._here.pop(file, None)
            self._change.notify_all()

    def close(self) -> None:
        """End the threads; returns when nothing is written any more."""
        self._stop.set()
        with self._change:
            self._change.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def measured(self) -> tuple[float, int]:
        """Seconds in which a file was on its way, and bytes that came."""
        with self._change:
            running = time.monotonic() - self._busy_since if self._coming else 0.0
            return self._download_s + running, self._bytes

    def _bring_all(self) -> None:
        while (file := self._take()) is not None:
            self._bring(file)

    def _take(self) -> RemoteFile | None:
        """The next file, once there is room for it; None if there is none, or the fetcher ends."""
        with self._change:
            while not self._stop.is_set() and self._error is None and self._next < len(self._files):
                number, file = self._files[self._next]
                if number <= self._released + 1 and self._on_disk + file.size <= self._max_bytes:
                    self._next += 1
                    self._on_disk += file.size
                    return file
                self._change.wait()
        return None

    def _bring(self, file: RemoteFile) -> None:
        try:
            found: Path | None = self._folder.complete(file)
            if found is None:
                found = self._fetch(file)
        except CancelledRequestError:
            return
        except Exception as error:
            if not (self._skip_missing and vanished(error)):
                with self._change:
                    self._error = self._error or error
                    self._change.notify_all()
                return
            _log.warning("%s; skipped", error)
            found = None
        with self._change:
            self._here[file] = found
            self._change.notify_all()

    def _fetch(self, file: RemoteFile) -> Path:
        target = self._folder.path_of(file)
        self._begin(file)
        try:
            with writing(target):
                target.parent.mkdir(exist_ok=True)
                path = self._source.fetch(file, target, stop=self._stop, on_bytes=self._came)
                size = path.stat().st_size
        finally:
            self._end(file)
        if size != file.size:
            self._folder.delete(file)
            raise OriginCorruptError(
                f"{self._source.name}: {file.key!r} came with {size} bytes, and {file.size} were listed: it changed "
                "or is damaged; a new epoch lists again"
            )
        return path

    def _begin(self, file: RemoteFile) -> None:
        with self._change:
            free = shutil.disk_usage(self._folder.files).free - sum(one.size for one in self._coming)
            if free < file.size + self._keep_free_bytes:
                raise InsufficientDiskError(
                    f"{file.key!r} needs {file.size} bytes; the disk of {self._folder.files} has {free} free, beside "
                    f"files on their way, of which {self._keep_free_bytes} stay free: make room, or lower "
                    "keep_free_bytes, cache_size or max_bytes",
                    {"needed": file.size, "free": free},
                )
            if not self._coming:
                self._busy_since = time.monotonic()
            self._coming.add(file)

    def _end(self, file: RemoteFile) -> None:
        with self._change:
            self._coming.remove(file)
            if not self._coming:
                self._download_s += time.monotonic() - self._busy_since

    def _came(self, count: int) -> None:
        with self._change:
            self._bytes += count
