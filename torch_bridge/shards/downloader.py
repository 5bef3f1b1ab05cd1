"""StreamingDownloader: shards fetched in the background, a few ahead, deleted when every reader is past them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from protocol.errors import CancelledRequestError, InsufficientDiskError, InvalidParamsError, ShoalError, TimedOutError
from protocol.manifest import ShardEntry
from torch_bridge.shards.buffer import adapted_size, smoothed
from torch_bridge.shards.disk import free_bytes
from torch_bridge.shards.failures import Failure
from torch_bridge.shards.plan import next_to_fetch
from torch_bridge.shards.readers import Ledger, Reader
from torch_bridge.shards.source import FetchedFile, ShardSource
from torch_bridge.shards.status import StreamingStatus

log = logging.getLogger(__name__)

Shard = ShardEntry | str | int
"""A shard by its entry, its file name, or its id."""
_LOOK_S = 0.25
_CLEAN_STOP_S = 30.0


class StreamingDownloader:
    """For one reader (a rank's worker); thread-safe. Threads run from `start` (or `with`) to `stop`.

    `shards`: what to fetch, in order; None: all of the manifest. `keep_behind`: so many shards that this reader is past
    stay. `pinned` (a validation shard): fetched first, never deleted. `retry_total_s`: how long a failure that may pass
    is tried again. `disk_patience_s`: how long a full disk with nothing left to consume is waited on.
    """

    def __init__(
        self, source: ShardSource, shards: Sequence[Shard] | None = None, *, buffer_size: int = 3, min_buffer: int = 1,
        max_buffer: int = 16, keep_behind: int = 0, warn_free_bytes: int = 5_000_000_000,
        stop_free_bytes: int = 1_000_000_000, run: str = "default", reader: str = "rank0-worker0",
        expected_readers: int = 1, pinned: Sequence[Shard] = (), at_once: int = 2, retry_total_s: float = 300.0,
        disk_patience_s: float = 30.0,
    ) -> None:  # fmt: skip
        if not 1 <= min_buffer <= buffer_size <= max_buffer:
            raise InvalidParamsError(
                f"buffer sizes must be 1 <= min {min_buffer} <= buffer_size {buffer_size} <= max {max_buffer}"
            )
        self._source = source
        self._by_name = {entry.filename: entry for entry in source.manifest().shards}
        self._by_id = {entry.shard_id: entry for entry in self._by_name.values()}
        chosen = self._by_name.values() if shards is None else shards
        self._order = [self._entry(shard).filename for shard in chosen]
        self._pinned = tuple(self._entry(shard).filename for shard in pinned)
        self._size, self._smallest, self._largest = buffer_size, min_buffer, max_buffer
        self._keep_behind, self._warn_free, self._stop_free = keep_behind, warn_free_bytes, stop_free_bytes
        self._run, self._reader, self._expected = run, reader, expected_readers
        self._at_once, self._retry_total_s, self._disk_patience_s = at_once, retry_total_s, disk_patience_s
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._ledger: Ledger | None = None
        self._epoch = 0
        self._consumed: list[str] = []
        self._here: dict[str, FetchedFile] = {}
        self._on_the_way: set[str] = set()
        self._failed: dict[str, Failure] = {}
        self._wanted: list[str] = []
        self._undeleted: list[str] = []
        self._deleted = 0
        self._warned = False
        self._full_since: float | None = None
        self._download_s = self._consume_s = self._rate = self._waits_s = 0.0
        self._last_consumed_at: float | None = None
        self._moved: dict[str, int] = {}

    def start(self) -> None:
        """Begin to fetch. Raises ShardInUseError where another process reads under this name."""
        if self._threads:
            return
        self._stopping.clear()
        self._source.folder.mkdir(parents=True, exist_ok=True)
        self._ledger = Ledger(self._source.folder, self._run, self._reader)
        with self._changed:
            self._write()
        self._threads = [
            threading.Thread(target=self._work, name=f"shards-{number}", daemon=True) for number in range(self._at_once)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = _CLEAN_STOP_S) -> None:
        """End downloads (what came is kept) and threads. Raises TimedOutError where one does not end."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        alive = [thread for thread in self._threads if thread.is_alive()]
        if alive:
            raise TimedOutError(
                f"{len(alive)} downloads did not end within {timeout_s:g} s: {sorted(self._on_the_way)}"
            )
        self._threads = []
        if self._ledger:
            self._ledger.close()
            self._ledger = None

    def set_order(self, shards: Sequence[Shard]) -> None:
        """The next epoch: its shards in order; none of them is consumed yet."""
        order = [self._entry(shard).filename for shard in shards]
        with self._changed:
            self._order, self._epoch, self._consumed = order, self._epoch + 1, []
            self._failed.clear()
            self._last_consumed_at = None
            self._write()
            self._changed.notify_all()

    def wait_for_shard(self, shard: Shard, timeout_s: float | None = None) -> Path:
        """The shard's file, fetched now if it is not here. It stays until `consumed`.

        Raises TimedOutError that says what goes on, or what the source said where it fails for good.
        """
        name = self._entry(shard).filename
        began = time.monotonic()
        with self._changed:
            self._wanted.append(name)
            self._changed.notify_all()
            try:
                while name not in self._here:
                    self._raise_if_hopeless(name)
                    left_s = _LOOK_S if timeout_s is None else min(_LOOK_S, began + timeout_s - time.monotonic())
                    if left_s <= 0:
                        raise TimedOutError(f"{name} was not here within {timeout_s:g} s: {self._what_goes_on(name)}")
                    self._changed.wait(left_s)
                return self._here[name].path
            finally:
                self._wanted.remove(name)
                self._waits_s += time.monotonic() - began

    def consumed(self, shard: Shard) -> None:
        """This reader is past the shard: it may be deleted once all are."""
        name = self._entry(shard).filename
        with self._changed:
            now = time.monotonic()
            if self._last_consumed_at is not None:
                self._consume_s = smoothed(self._consume_s, now - self._last_consumed_at)
                bounds = self._smallest, self._largest
                self._size = adapted_size(self._size, *bounds, self._download_s, self._consume_s)
            self._last_consumed_at = now
            if name not in self._consumed:
                self._consumed.append(name)
            self._here.pop(name, None)
            self._undeleted = [*(other for other in self._undeleted if other != name), name]
            self._write()
            self._delete()
            self._changed.notify_all()

    def status(self) -> StreamingStatus:
        with self._changed:
            return StreamingStatus(
                tuple(self._here), tuple(sorted(self._on_the_way)),
                {name: str(failure.error) for name, failure in self._failed.items()}, len(self._consumed),
                self._deleted, free_bytes(self._source.folder), self._size, self._rate, self._waits_s,
                dict(self._moved),
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: what this reader is past, by file name."""
        with self._changed:
            return {"version": 1, "epoch": self._epoch, "order": list(self._order), "consumed": list(self._consumed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises InvalidParamsError for a shard that the manifest does not have."""
        order = [self._entry(name).filename for name in state["order"]]
        consumed = [self._entry(name).filename for name in state["consumed"]]
        with self._changed:
            self._epoch, self._order, self._consumed = int(state["epoch"]), order, consumed
            for name in consumed:
                self._here.pop(name, None)
            self._undeleted = list(consumed)
            self._write()
            self._changed.notify_all()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # In the threads

    def _work(self) -> None:
        while not self._stopping.is_set():
            with self._changed:
                name = self._next()
                if name is None:
                    self._changed.wait(_LOOK_S)
                    continue
                self._on_the_way.add(name)
                self._write()  # before the fetch: what is on its way to this reader is nobody's to delete
            try:
                found: FetchedFile | ShoalError = self._source.fetch(self._by_name[name], stop=self._stopping)
            except ShoalError as err:
                found = err
            except OSError as err:
                found = InsufficientDiskError(f"{name} could not be written: {err}")
            with self._changed:
                self._on_the_way.discard(name)
                self._take(name, found)
                self._write()
                self._delete()
                self._changed.notify_all()

    def _next(self) -> str | None:
        free = free_bytes(self._source.folder)
        if free < self._warn_free and not self._warned:
            self._warned = True
            log.warning(
                "%s has %d bytes free: below %d no shard is fetched", self._source.folder, free, self._stop_free
            )
        if free < self._stop_free:
            self._full_since = self._full_since or time.monotonic()
            self._delete()
            return None
        self._full_since = None
        now = time.monotonic()
        return next_to_fetch(
            self._order, pinned=self._pinned, here=self._here, on_the_way=self._on_the_way,
            consumed=set(self._consumed), wanted=self._wanted, ahead=self._size,
            not_now=[name for name, failure in self._failed.items() if failure.for_good or now < failure.again_at],
        )  # fmt: skip

    def _take(self, name: str, found: FetchedFile | ShoalError) -> None:
        if isinstance(found, FetchedFile):
            self._failed.pop(name, None)
            if name not in self._consumed or name in self._pinned or name in self._wanted:
                self._here[name] = found
            for source, moved in found.bytes_by_source.items():
                self._moved[source] = self._moved.get(source, 0) + moved
            if moved := sum(found.bytes_by_source.values()):
                self._download_s = smoothed(self._download_s, found.seconds)
                self._rate = smoothed(self._rate, moved / max(found.seconds, 1e-3))
        elif not isinstance(found, CancelledRequestError):
            before = self._failed.get(name)
            self._failed[name] = failure = Failure(found, before, self._retry_total_s)
            log.warning("%s %s: %s", name, "is given up" if failure.for_good else "is tried again", found)

    def _write(self) -> None:
        if self._ledger is None:
            return
        past, behind = set(self._consumed), self._consumed[-self._keep_behind or len(self._consumed) :]
        self._ledger.write(
            Reader(
                expected=self._expected,
                epoch=self._epoch,
                remaining=tuple(name for name in self._order if name not in past),
                held=tuple({*self._here, *self._on_the_way, *behind, *self._pinned}),
            )
        )

    def _delete(self) -> None:
        if self._ledger is None or not self._undeleted:
            return
        gone = self._ledger.delete(self._undeleted, lambda name: self._source.discard(self._by_name[name]))
        self._deleted += len(gone)
        self._undeleted = [name for name in self._undeleted if name not in gone]

    # What a waiter is told

    def _raise_if_hopeless(self, name: str) -> None:
        if not self._threads or self._stopping.is_set():
            raise CancelledRequestError(f"{name} is not fetched: the downloader does not run; call start()")
        failure = self._failed.get(name)
        if failure and failure.for_good:
            raise failure.error
        full_s = time.monotonic() - self._full_since if self._full_since else 0.0
        if full_s > self._disk_patience_s and not self._on_the_way:
            raise InsufficientDiskError(
                f"{name} cannot be fetched: {free_bytes(self._source.folder)} bytes are free in {self._source.folder}, "
                f"below {self._stop_free}, for {full_s:.0f} s; free some, or lower stop_free_bytes or keep_behind"
            )

    def _what_goes_on(self, name: str) -> str:
        if name in self._on_the_way:
            return f"it is being downloaded, at {self._rate / 1e6:.1f} MB/s lately"
        if failure := self._failed.get(name):
            return f"the last try failed: {failure.error}"
        if self._full_since:
            return f"no download begins below {self._stop_free} free bytes"
        return f"others are downloaded first: {sorted(self._on_the_way)}"

    def _entry(self, shard: Shard) -> ShardEntry:
        name = shard.filename if isinstance(shard, ShardEntry) else shard
        entry = self._by_id.get(name) if isinstance(name, int) else self._by_name.get(name)
        if entry is None:
            raise InvalidParamsError(f"the data set has no shard {name!r}; it has {len(self._by_name)} shards")
        return entry
