"""Chunks on disk under a hard limit, shared by every process of a machine that uses the folder.

Locks are flocks, which end with their process. One, on `lock`, guards what the folder holds and the sum in that file.
The other is on the file that a chunk is being written to, NAME.part, made at full length: who holds it fetches that
chunk, the others wait for it; one that nobody holds was left by a crash and goes. A chunk appears by rename, whole.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch_bridge.objects.chunk_file import HEADER_BYTES, OpenChunk, open_chunk, write_chunk

OPEN_CHUNKS = 256
"""Kept open for each thread."""
TOUCH_S = 5.0
"""A chunk's time of use is written at most this often by one process."""
_log = logging.getLogger(__name__)
_claims: set[int] = set()
"""Descriptors of chunks that this process is writing."""


@dataclass
class ChunkClaim:
    """The right to fetch a chunk, and room for it; `fd` is None where there is no room, or no folder to write to."""

    name: str
    length: int
    fd: int | None


class ChunkCache:
    """It travels to other processes. Two runs with different limits keep to the smaller one as long as both run."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._begin()

    def _begin(self) -> None:
        self._mine = threading.local()
        self._checked: set[str] = set()
        self._limit: int | None = None
        self._warned = False

    def sweep(self) -> None:
        """Delete what a crash left, and what is above the limit."""
        with self._guarded(), self._locked() as lock:
            self._make_room(lock, 0)

    def opened(self, name: str, length: int) -> OpenChunk | None:
        """A chunk to read from, or None where it is not here. Its bytes are checked when a process first opens it."""
        files, key, now = self.held(), _parts(name), time.monotonic()
        if (chunk := files.get(key)) is None:
            try:
                chunk = open_chunk(self.folder / name, length, check=name not in self._checked)
            except FileNotFoundError:
                return None
            except OSError as error:
                self._warn(error)
                return None
            if chunk is None:
                _log.warning("cached chunk %s is damaged: it is fetched again", self.folder / name)
                self._discard(name)
                return None
            self._checked.add(name)
            files[key] = chunk
            if len(files) > OPEN_CHUNKS:
                files.popitem(last=False)
        if now - chunk.touched_s > TOUCH_S or not chunk.touched_s:
            with suppress(OSError):
                chunk.touch(now)
            if chunk.evicted:  # it holds disk space as long as it is open
                files.pop(key, None)
        return chunk

    def held(self) -> OrderedDict[tuple[str | None, int], OpenChunk]:
        """The chunks that this thread has open, by the two parts of their names. Not to be changed."""
        try:
            return self._mine.files  # type: ignore[no-any-return]
        except AttributeError:
            files: OrderedDict[tuple[str | None, int], OpenChunk] = OrderedDict()
            self._mine.files = files
            return files

    def forget(self) -> None:
        """Close what was evicted meanwhile: it takes disk space until then."""
        files = self.held()
        for key in [key for key, chunk in files.items() if chunk.evicted]:
            files.pop(key)

    def claim(self, wanted: Mapping[str, int]) -> list[ChunkClaim]:
        """Of chunks by name and length, those that this caller is to fetch now: neither here nor being fetched. Each
        is given back by `publish` or `abandon`.
        """
        claims: list[ChunkClaim] = []
        with self._guarded(), self._locked() as lock:
            for name, length in wanted.items():
                if (self.folder / name).exists():
                    continue
                if (left := self._part(name)) is not None:
                    free = _free(left)
                    os.close(left)
                    if not free:
                        continue
                    self._remove(lock, f"{name}.part", cost_of(HEADER_BYTES + length))
                cost = cost_of(HEADER_BYTES + length)
                if not self._reserve(lock, cost):
                    claims.append(ChunkClaim(name, length, None))
                    continue
                fd = os.open(self.folder / f"{name}.part", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                _claims.add(fd)
                claims.append(ChunkClaim(name, length, fd))
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.ftruncate(fd, HEADER_BYTES + length)
            return claims
        # No folder to write to: everything that has no claim yet is read without one.
        known = {claim.name for claim in claims}
        return claims + [ChunkClaim(name, length, None) for name, length in wanted.items() if name not in known]

    def publish(self, claim: ChunkClaim, data: bytes) -> None:
        """Keep a fetched chunk. Where the disk does not take it, it is not kept, and one warning says so."""
        if claim.fd is None:
            return
        with self._guarded():
            write_chunk(claim.fd, data)
            with self._locked():
                os.rename(self.folder / f"{claim.name}.part", self.folder / claim.name)
                self._release(claim)
        self.abandon(claim)

    def abandon(self, claim: ChunkClaim) -> None:
        """Give a claim back; nothing happens where that was done."""
        if claim.fd is None:
            return
        with suppress(OSError), self._locked() as lock:
            self._remove(lock, f"{claim.name}.part", cost_of(HEADER_BYTES + claim.length))
        self._release(claim)

    def wait(self, name: str) -> None:
        """Until nobody is fetching the chunk."""
        with suppress(OSError):
            if (fd := self._part(name)) is not None:
                try:
                    fcntl.flock(fd, fcntl.LOCK_SH)
                    fcntl.flock(fd, fcntl.LOCK_UN)
                finally:
                    os.close(fd)

    # Under the lock.

    def _reserve(self, lock: int, cost: int) -> bool:
        total = int.from_bytes(os.pread(lock, 8, 0), "little")
        if total + cost > self._smallest_limit() and not self._make_room(lock, cost):
            return False
        total = int.from_bytes(os.pread(lock, 8, 0), "little")
        os.pwrite(
            lock, (total + cost).to_bytes(8, "little"), 0
        )  # before there is a file: a crash errs to the safe side
        return True

    def _make_room(self, lock: int, need: int) -> bool:
        """Evict, and count what there is anew."""
        kept, pinned = [], 0
        for entry in os.scandir(self.folder):
            if "-" not in entry.name or entry.name.startswith("limit-"):
                continue
            stat = entry.stat()
            if not entry.name.endswith(".part"):
                kept.append(CachedChunk(stat.st_mtime_ns, cost_of(stat.st_size), entry.name))
                continue
            fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
            if _free(fd):
                os.unlink(entry.path)
            else:
                pinned += cost_of(stat.st_size)
            os.close(fd)
        going = evicted(kept, pinned, need, self._smallest_limit())
        for one in going or []:
            os.unlink(self.folder / one.name)
        total = pinned + sum(one.cost for one in kept) - sum(one.cost for one in going or [])
        os.pwrite(lock, total.to_bytes(8, "little"), 0)
        self.forget()
        return going is not None

    def _remove(self, lock: int, name: str, cost: int) -> None:
        os.unlink(self.folder / name)
        total = int.from_bytes(os.pread(lock, 8, 0), "little")
        os.pwrite(lock, max(0, total - cost).to_bytes(8, "little"), 0)

    def _smallest_limit(self) -> int:
        """Of all runs that have the folder open: each holds a lock on a file that is named after its limit."""
        limits = [self.limit_bytes]
        for entry in os.scandir(self.folder):
            if not entry.name.startswith("limit-"):
                continue
            fd = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
            if int(entry.name[6:]) == self.limit_bytes or not _free(fd):
                limits.append(int(entry.name[6:]))
            else:
                os.unlink(entry.path)
            os.close(fd)
        return min(limits)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._limit is None:
                limit = self.folder / f"limit-{self.limit_bytes}"
                self._limit = os.open(limit, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                fcntl.flock(self._limit, fcntl.LOCK_SH)
            yield lock
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # by hand: a child that was forked meanwhile has the descriptor, too
            os.close(lock)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("the cache in %s cannot be used (%s): reads go on without it", self.folder, error)

    def _discard(self, name: str) -> None:
        with self._guarded(), self._locked() as lock, suppress(FileNotFoundError):
            os.unlink(self.folder / name)
            self._make_room(lock, 0)

    def _part(self, name: str) -> int | None:
        with suppress(FileNotFoundError):
            return os.open(self.folder / f"{name}.part", os.O_RDWR | os.O_CLOEXEC)
        return None

    def _release(self, claim: ChunkClaim) -> None:
        if claim.fd is not None:
            fcntl.flock(claim.fd, fcntl.LOCK_UN)
            _claims.discard(claim.fd)
            os.close(claim.fd)
            claim.fd = None

    def close(self) -> None:
        """Close this thread's files and take the limit back; the next use opens them again."""
        self._mine = threading.local()
        if self._limit is not None:
            os.close(self._limit)
            self._limit = None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit_bytes": self.limit_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def _parts(name: str) -> tuple[str, int]:
    stem, _, index = name.rpartition("-")
    return stem, int(index)


def _free(fd: int) -> bool:
    """Whether no process holds a lock on it; this one holds it then, until the descriptor is closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _after_fork() -> None:
    # What the parent is writing stays the parent's: held here, too, it would seem alive after its death.
    for fd in _claims:
        os.close(fd)
    _claims.clear()


os.register_at_fork(after_in_child=_after_fork)


BLOCK_BYTES = 4096
"""File systems give whole blocks."""
SLACK = 20
"""Room for one part in so many is made beyond what is needed: the next few chunks then need no look at the folder."""


class CachedChunk(NamedTuple):
    """A chunk's file."""

    used_ns: int
    """When it was last read, within the time between two touches."""
    cost: int
    name: str


def cost_of(file_bytes: int) -> int:
    """Bytes that a file takes on the disk."""
    return -(-file_bytes // BLOCK_BYTES) * BLOCK_BYTES


def evicted(
    kept: Iterable[CachedChunk], pinned_bytes: int, need_bytes: int, limit_bytes: int
) -> list[CachedChunk] | None:
    """The chunks to delete, those longest unread first, so that `need_bytes` fit beside the others and what is pinned
    (being written); None where even all of them would not do, and none should go. None go where there is room.
    """
    files = sorted(kept)
    total = pinned_bytes + sum(one.cost for one in files)
    if total + need_bytes <= limit_bytes:
        return []
    if pinned_bytes + need_bytes > limit_bytes:
        return None
    goal = max(limit_bytes - limit_bytes // SLACK, pinned_bytes + need_bytes)
    going: list[CachedChunk] = []
    for one in files:
        if total + need_bytes <= goal:
            break
        going.append(one)
        total -= one.cost
    return going
