"""StreamingDownloader: shards fetched in the background, a few ahead, deleted when every reader is past them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import msgspec

from protocol import errors
from protocol.errors import CancelledRequestError, InsufficientDiskError, InvalidParamsError, ShoalError, TimedOutError
from protocol.manifest import ShardEntry
from torch_bridge.core.closing import ClosingStack
from torch_bridge.core.folders import writing_to
from torch_bridge.core.loop_thread import ServingThread
from torch_bridge.core.sizes import byte_count
from torch_bridge.shards.disk_limit import DiskLimit, SharedOrder
from torch_bridge.shards.disk_space import FreeSpace, disk_full_errors
from torch_bridge.shards.readers import ReaderLedger, ReaderState
from torch_bridge.shards.shard_file import as_published
from torch_bridge.shards.sources.interface import FetchedFile, ShardSource
from torch_bridge.shards.status import DownloadMeter, StreamingStatus
from torch_bridge.shards.window import FIRST_PAUSE_S, HEAD_START_S, ShardWindow

log = logging.getLogger(__name__)

Shard = ShardEntry | str | int
"""A shard by its entry, its file name, or its id."""
_LOOK_S, _CLEAN_STOP_S = 0.25, 30.0
_ROOM_LOOK_S = 0.05
"""Between two looks whether other readers made room."""
_WARN_S = 60.0


@dataclass(frozen=True)
class _Waiting:
    """A caller that waits for room within the limit."""

    name: str
    since: float
    """On the monotonic clock."""
    movable_at: float
    """When another reader could last have made room."""
    why: str = ""


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
        disk_limit: int | str | None = None,
        shared_order: SharedOrder | None = None,
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
            disk_limit: Bytes, or "10gb": all readers of the run on this machine together keep no more in the folder.
            shared_order: For a limit: what all readers read, in one order; None: each has an equal part of the limit.

        Raises:
            InvalidParamsError: A size is out of range, or the manifest does not have one of `shards`.
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
        if (ledger := source.ledger_folder) is None:  # nothing is written, so no room is needed
            warn_free_bytes = stop_free_bytes = 0
        self._ledger_folder = ledger
        self._space = FreeSpace(source.folder, warn_free_bytes, stop_free_bytes)
        self._limit = None
        if disk_limit is not None:
            limit = DiskLimit(source, self._by_name, byte_count(disk_limit), shared_order, held)
            self._limit = limit if ledger else None
        self._no_room: _Waiting | None = None
        self._warned_at = self._look_again_at = 0.0
        self._blocked: object = None
        """What there was no room for, and what the ledger looked like."""
        self._left_at: object = None
        self._fetched: set[str] = set()
        """Shards that the source has fetched here and not discarded."""
        self._run, self._reader = run, reader
        self._at_once, self._retry_total_s, self._disk_patience_s = at_once, retry_total_s, disk_patience_s
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._threads: list[ServingThread] = []
        self._ledger: ReaderLedger | None = None
        self._deleted = 0

    def start(self) -> None:
        """Start to fetch. Raises ShardInUseError if a process reads under this name, InsufficientDiskError, and
        InvalidParamsError for a folder that cannot be written, or if the limit of the disk is too little for what must
        be there at once.
        """
        if self._threads:
            return
        self._stopping.clear()
        self._window.alone_until = time.monotonic() + HEAD_START_S
        if (folder := self._ledger_folder) is not None:
            with disk_full_errors(folder), writing_to(folder, "folder"):
                folder.mkdir(parents=True, exist_ok=True)
                self._ledger = ReaderLedger.join(folder, self._run, self._reader, self._state())
            if self._limit:
                self._require_room(self._limit, self._ledger)
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
                if self._waits_for(name):
                    self._no_room = None
                    self._note()
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
                None if self._limit is None else self._limit.limit_bytes,
                0 if self._limit is None else self._disk_bytes(self._limit),
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
            if name is None or not self._begin(name):
                self._leave_room()
                self._changed.wait(_LOOK_S if name is None else _ROOM_LOOK_S)
                return
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

    def _begin(self, name: str) -> bool:
        """Count the shard as on its way; False if a limit has no room for it."""
        if self._ledger_folder is None:
            self._window.on_the_way.add(name)
            return True
        if self._ledger is None:
            return False
        seen = None if self._limit is None else (name, name in self._window.wanted, self._ledger.mark())
        if seen is not None and seen == self._blocked and time.monotonic() < self._look_again_at:
            return False
        with self._ledger.alone():
            if self._limit and not self._has_room(name, self._limit, self._ledger):
                self._blocked, self._look_again_at = seen, time.monotonic() + _LOOK_S
                return False
            self._window.on_the_way.add(name)
            try:
                self._write()  # before the fetch: no reader deletes a shard that is on its way to this one
            except BaseException:
                self._window.on_the_way.discard(name)
                raise
        return True

    def _has_room(self, name: str, limit: DiskLimit, ledger: ReaderLedger) -> bool:
        """Make room for a shard within the limit, or note why there is none."""
        now, before = time.monotonic(), self._no_room
        if before is None or before.name != name:
            before = _Waiting(name, now, now)
        wanted = name in self._window.wanted
        while True:
            why = limit.take(name, self._state(), ledger, self._evict, now - before.since if wanted else None)
            if why is None or not (why.gives_way and self._window.give_way()):
                break
            self._write()
            self._delete()
        if why is None and self._waits_for(name):
            self._no_room = None
        if why is not None and wanted:
            self._no_room = replace(before, why=why.text, movable_at=before.movable_at if why.is_final else now)
            self._note()
            if why.unchanged_s > _WARN_S and now - self._warned_at > _WARN_S:
                self._warned_at = now
                log.warning("for %.0f s no reader has moved: %s", why.unchanged_s, why.text)
            self._changed.notify_all()
        return why is None

    def _waits_for(self, name: str) -> bool:
        return self._no_room is not None and self._no_room.name == name

    def _leave_room(self) -> None:
        """Once another reader has moved: delete what none needs any more, and drop what was fetched ahead of a shard
        that another waits for.
        """
        if self._limit is None or self._ledger is None or self._ledger.mark() == self._left_at:
            return
        self._left_at = self._ledger.mark()
        self._delete()
        if (name := self._window.last_ahead()) is None:
            return
        with self._ledger.alone():
            if self._limit.may_need_less(name, self._ledger.view()) and self._window.give_way():
                self._write()
                self._delete()

    def _evict(self, name: str) -> bool:
        """Delete a shard that no reader holds."""
        gone = self._discard(name)
        self._deleted += gone
        self._window.undeleted = [other for other in self._window.undeleted if other != name or not gone]
        return gone

    def _disk_bytes(self, limit: DiskLimit) -> int:
        return limit.used_bytes(self._state(), None if self._ledger is None else self._ledger.view())

    def _require_room(self, limit: DiskLimit, ledger: ReaderLedger) -> None:
        try:
            with ledger.alone():
                limit.require(self._state(), ledger, self._window.order)
                limit.shrink(self._state(), ledger, self._evict)
        except BaseException:
            self._ledger = None
            ledger.close()
            raise

    def _next(self) -> str | None:
        if not self._space.is_enough():
            self._delete()
            return None
        return self._window.next(time.monotonic(), self._measures.size)

    def _take(self, name: str, found: FetchedFile | ShoalError) -> None:
        self._window.on_the_way.discard(name)
        if isinstance(found, FetchedFile):
            self._measures.came(found)
            self._fetched.add(name)
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
            self._ledger.write(self._state())

    def _state(self) -> ReaderState:
        """What the ledger gets to know. Under a limit what is kept behind gives way: no reader needs it."""
        state = self._window.reader()
        if self._limit is None:
            return state
        return self._limit.stated(
            msgspec.structs.replace(
                state,
                held=tuple(
                    name for name in state.held if name not in set(self._window.behind) - {*self._window.pinned}
                ),
                kept=tuple(name for name in self._window.undeleted if name in self._fetched),
                waits=self._no_room.name if self._no_room else "",
            )
        )

    def _delete(self) -> None:
        behind = self._window.behind if self._limit else []
        candidates = [name for name in self._window.undeleted if name not in behind]
        if self._ledger is None or not candidates:
            return
        gone = self._ledger.delete(candidates, self._discard)
        self._deleted += len(gone)
        self._window.undeleted = [name for name in self._window.undeleted if name not in gone]

    def _discard(self, name: str) -> bool:
        try:
            gone = self._source.discard(self._by_name[name])
        except (ShoalError, OSError) as err:
            log.warning("%s is deleted later: %s", name, err)
            return False
        self._fetched -= {name} if gone else set()
        return gone

    # For callers that wait

    def _raise_if_given_up(self, name: str) -> None:
        if not self._threads or self._stopping.is_set():
            raise CancelledRequestError(f"{name} is not fetched: the downloader does not run; call start()")
        failure = self._window.failed.get(name)
        if failure and failure.for_good:
            raise failure.error
        waiting = self._no_room if self._waits_for(name) else None
        if waiting and time.monotonic() - waiting.movable_at > self._disk_patience_s:
            raise InsufficientDiskError(waiting.why)
        if self._space.full_s > self._disk_patience_s and not self._window.on_the_way:
            raise InsufficientDiskError(f"{name} cannot be fetched: {self._space}, for {self._space.full_s:.0f} s")

    def _explanation(self, name: str) -> str:
        if self._space.full_s and name not in self._window.on_the_way:
            return f"no download begins: {self._space}"
        if self._no_room and self._no_room.name == name:
            return self._no_room.why
        return self._window.explanation(name, self._measures.rate_bytes_s)

    def _entry(self, shard: Shard) -> ShardEntry:
        name = shard.filename if isinstance(shard, ShardEntry) else shard
        entry = self._by_id.get(name) if isinstance(name, int) else self._by_name.get(name)
        if entry is None:
            raise InvalidParamsError(f"the data set has no shard {name!r}; it has {len(self._by_name)} shards")
        return entry
