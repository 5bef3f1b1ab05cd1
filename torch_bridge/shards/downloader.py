"""StreamingDownloader: shards fetched in the background, a few ahead, deleted when every reader is past them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from protocol import errors
from protocol.errors import CancelledRequestError, InsufficientDiskError, InvalidParamsError, ShoalError, TimedOutError
from protocol.manifest import ShardEntry
from torch_bridge.core.closing import ClosingStack
from torch_bridge.core.loop_thread import ServingThread
from torch_bridge.shards.disk_space import FreeSpace, disk_full_errors
from torch_bridge.shards.readers import ReaderLedger
from torch_bridge.shards.shard_file import as_published
from torch_bridge.shards.sources.interface import FetchedFile, ShardSource
from torch_bridge.shards.status import DownloadMeter, StreamingStatus
from torch_bridge.shards.window import FIRST_PAUSE_S, HEAD_START_S, ShardWindow

log = logging.getLogger(__name__)

Shard = ShardEntry | str | int
"""A shard by its entry, its file name, or its id."""
_LOOK_S, _CLEAN_STOP_S = 0.25, 30.0


class StreamingDownloader:
    """For one reader (a rank's worker). Thread-safe. Its threads run from `start` (or `with`) to `stop`."""

    def __init__(
        self,
        source: ShardSource,
        shards: Sequence[Shard] | None = None,
        *,
        buffer_size: int = 3,
        min_buffer: int = 1,
        max_buffer: int = 16,
        keep_behind: int = 0,
        warn_free_bytes: int = 5_000_000_000,
        stop_free_bytes: int = 1_000_000_000,
        run: str = "default",
        reader: str = "rank0-worker0",
        expected_readers: int = 1,
        pinned: Sequence[Shard] = (),
        at_once: int = 2,
        retry_total_s: float = 300.0,
        retry_first_s: float = FIRST_PAUSE_S,
        disk_patience_s: float = 30.0,
    ) -> None:
        """Args:
            source: Where shards come from.
            shards: What to fetch, in order; None: all shards of the manifest.
            buffer_size: Shards to keep ahead at first; it adapts between `min_buffer` and `max_buffer`.
            keep_behind: So many shards that this reader is past stay on disk.
            warn_free_bytes: Below so much free disk it warns, once.
            stop_free_bytes: Below so much free disk no download begins.
            run: A name for all readers that go through the shards together.
            reader: A name for this one among them.
            expected_readers: Readers of the run on this machine; nothing is deleted before all have registered.
            pinned: Shards (for validation) that are fetched first and never deleted.
            at_once: Downloads at a time.
            retry_total_s: For so long a failure that may pass is tried again.
            retry_first_s: The pause before the second try; it doubles with each try.
            disk_patience_s: For so long it waits on a full disk with no shard left to consume.

        Raises:
            InvalidParamsError: A buffer size is out of range, or the manifest does not have one of `shards`.
        """
        if not 1 <= min_buffer <= buffer_size <= max_buffer:
            raise InvalidParamsError(
                f"buffer sizes must be 1 <= min {min_buffer} <= buffer_size {buffer_size} <= max {max_buffer}"
            )
        self._source = source
        self._by_name = {entry.filename: entry for entry in source.manifest().shards}
        self._by_id = {entry.shard_id: entry for entry in self._by_name.values()}
        order = [self._entry(shard).filename for shard in (self._by_name.values() if shards is None else shards)]
        held = tuple(self._entry(shard).filename for shard in pinned)
        self._window = ShardWindow(order, held, keep_behind, expected_readers, retry_first_s)
        self._measures = DownloadMeter(buffer_size, min_buffer, max_buffer)
        self._space = FreeSpace(source.folder, warn_free_bytes, stop_free_bytes)
        self._run, self._reader = run, reader
        self._at_once, self._retry_total_s, self._disk_patience_s = at_once, retry_total_s, disk_patience_s
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._threads: list[ServingThread] = []
        self._ledger: ReaderLedger | None = None
        self._deleted = 0

    def start(self) -> None:
        """Start to fetch. Raises ShardInUseError if a process reads under this name, InsufficientDiskError."""
        if self._threads:
            return
        self._stopping.clear()
        self._window.alone_until = time.monotonic() + HEAD_START_S
        with disk_full_errors(self._source.folder):
            self._source.folder.mkdir(parents=True, exist_ok=True)
            self._ledger = ReaderLedger.join(self._source.folder, self._run, self._reader, self._window.reader())
        self._threads = [ServingThread(self._work, f"shards-{number}") for number in range(self._at_once)]
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float = _CLEAN_STOP_S) -> None:
        """End downloads (bytes that came are kept) and threads. Raises TimedOutError if one does not end."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        alive = [thread for thread in self._threads if thread.is_alive()]
        if alive:
            raise TimedOutError(
                f"{len(alive)} downloads did not end within {timeout_s:g} s: {sorted(self._window.on_the_way)}"
            )
        self._threads = []
        if self._ledger:
            with self._changed, self._ledger.alone():  # one step: of two that end, one must delete
                self._delete()
                for name in self._window.undeleted:
                    self._source.release(self._by_name[name])
            self._ledger.close()
            self._ledger = None

    def set_order(self, shards: Sequence[Shard]) -> None:
        """Begin the next epoch: its shards in order, none of them consumed."""
        order = [self._entry(shard).filename for shard in shards]
        with self._changed:
            self._measures.pause()
            self._read_on(order, self._window.epoch + 1, [])

    def wait_for_shard(self, shard: Shard, timeout_s: float | None = None) -> Path:
        """The shard's file, fetched now if it is not here. It stays until `consumed`.

        Raises TimedOutError, which says what is being done, or the source's error if the shard is given up.
        """
        name = self._entry(shard).filename
        began = time.monotonic()
        with self._changed:
            self._window.wanted.append(name)
            self._changed.notify_all()
            try:
                while name not in self._window.here:
                    self._raise_if_given_up(name)
                    left_s = _LOOK_S if timeout_s is None else min(_LOOK_S, began + timeout_s - time.monotonic())
                    if left_s <= 0:
                        raise TimedOutError(f"{name} was not here within {timeout_s:g} s: {self._explanation(name)}")
                    self._changed.wait(left_s)
                return self._window.hand_out(name).path
            finally:
                self._window.wanted.remove(name)
                self._measures.waits_s += time.monotonic() - began

    def consumed(self, shard: Shard) -> None:
        """This reader is past the shard. It is deleted once all readers are."""
        name = self._entry(shard).filename
        with self._changed:
            self._measures.consumed()
            self._window.past(name)
            self._note()
            self._delete()
            self._changed.notify_all()

    def distrust(self, shard: Shard, why: str) -> None:
        """Report that the file cannot be decoded: if its bytes are wrong, the next `wait_for_shard` fetches it again.

        If they are those that were published, it is handed out once more (another process may have replaced it), and
        from the second time on `wait_for_shard` raises InvalidShardError.
        """
        name = (entry := self._entry(shard)).filename
        with self._changed:
            while name in self._window.on_the_way and not self._stopping.is_set():
                self._changed.wait(_LOOK_S)
            known = self._window.distrust(name)
        failure: ShoalError | None = None
        try:
            if not self._source.distrust(entry, why) and known:
                failure = as_published(entry, why)
        except ShoalError as err:
            failure = err
        finally:
            with self._changed:
                self._window.on_the_way.discard(name)
                if failure:
                    self._window.did_not_come(name, failure, self._retry_total_s)
                self._note()
                self._changed.notify_all()

    def status(self) -> StreamingStatus:
        with self._changed:
            return StreamingStatus(
                tuple(self._window.here),
                tuple(sorted(self._window.on_the_way)),
                self._window.errors(),
                len(self._window.consumed),
                self._deleted,
                self._space.free_bytes(),
                self._measures.size,
                self._measures.rate_bytes_s,
                self._measures.waits_s,
                dict(self._measures.moved),
            )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the shards that this reader is past, by file name."""
        with self._changed:
            return self._window.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Raises InvalidParamsError for a shard that the manifest does not have."""
        order = [self._entry(name).filename for name in state["order"]]
        consumed = [self._entry(name).filename for name in state["consumed"]]
        with self._changed:
            self._read_on(order, int(state["epoch"]), consumed)

    def __enter__(self) -> Self:
        self.start()
        self._held = ClosingStack(self.stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    # In the threads

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                self._fetch_one()
            except Exception as err:  # if the thread died, its reader would wait for ever
                log.warning("no shard is fetched for now: %s", err, exc_info=not isinstance(err, OSError | ShoalError))
                self._stopping.wait(_LOOK_S * 4)

    def _fetch_one(self) -> None:
        with self._changed:
            name = self._next()
            if name is None:
                self._changed.wait(_LOOK_S)
                return
            self._window.on_the_way.add(name)
            try:
                self._write()  # before the fetch: no reader deletes a shard that is on its way to this one
            except BaseException:
                self._window.on_the_way.discard(name)
                raise
        found: FetchedFile | ShoalError = CancelledRequestError(f"{name} was not fetched")
        try:
            found = self._source.fetch(self._by_name[name], stop=self._stopping)
        except ShoalError as err:
            found = err
        except OSError as err:
            found = InsufficientDiskError(f"{name} could not be written: {err}")
        except Exception as err:
            found = errors.InternalError(f"{name} could not be fetched: {type(err).__name__}: {err}")
            raise
        finally:
            with self._changed:
                self._take(name, found)
                self._note()
                self._delete()
                self._changed.notify_all()

    def _next(self) -> str | None:
        if not self._space.is_enough():
            self._delete()
            return None
        return self._window.next(time.monotonic(), self._measures.size)

    def _take(self, name: str, found: FetchedFile | ShoalError) -> None:
        self._window.on_the_way.discard(name)
        if isinstance(found, FetchedFile):
            self._measures.came(found)
            self._window.came(name, found)
        elif failure := self._window.did_not_come(name, found, self._retry_total_s):
            log.warning("%s %s: %s", name, "is given up" if failure.for_good else "is tried again", found)

    def _read_on(self, order: list[str], epoch: int, consumed: list[str]) -> None:
        self._window.read_on(order, epoch, consumed)
        self._note()
        self._delete()
        self._changed.notify_all()

    def _note(self) -> None:
        """Write a state that holds fewer shards. If the disk is full, the old one stays: it holds too many, safely."""
        try:
            self._write()
        except OSError as err:
            log.warning("the state of this reader is not written to %s: %s", self._source.folder, err)

    def _write(self) -> None:
        if self._ledger is not None:
            self._ledger.write(self._window.reader())

    def _delete(self) -> None:
        if self._ledger is None or not self._window.undeleted:
            return
        gone = self._ledger.delete(self._window.undeleted, self._discard)
        self._deleted += len(gone)
        self._window.undeleted = [name for name in self._window.undeleted if name not in gone]

    def _discard(self, name: str) -> bool:
        try:
            return self._source.discard(self._by_name[name])
        except (ShoalError, OSError) as err:
            log.warning("%s is deleted later: %s", name, err)
            return False

    # For callers that wait

    def _raise_if_given_up(self, name: str) -> None:
        if not self._threads or self._stopping.is_set():
            raise CancelledRequestError(f"{name} is not fetched: the downloader does not run; call start()")
        failure = self._window.failed.get(name)
        if failure and failure.for_good:
            raise failure.error
        if self._space.full_s > self._disk_patience_s and not self._window.on_the_way:
            raise InsufficientDiskError(f"{name} cannot be fetched: {self._space}, for {self._space.full_s:.0f} s")

    def _explanation(self, name: str) -> str:
        if self._space.full_s and name not in self._window.on_the_way:
            return f"no download begins: {self._space}"
        return self._window.explanation(name, self._measures.rate_bytes_s)

    def _entry(self, shard: Shard) -> ShardEntry:
        name = shard.filename if isinstance(shard, ShardEntry) else shard
        entry = self._by_id.get(name) if isinstance(name, int) else self._by_name.get(name)
        if entry is None:
            raise InvalidParamsError(f"the data set has no shard {name!r}; it has {len(self._by_name)} shards")
        return entry
