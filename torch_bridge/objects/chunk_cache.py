"""Chunks on disk under a hard limit, shared by every process of a machine that uses the folder.

One lock, on the file `lock`, guards what the folder holds, and the sum of it in that file. Another one is on the file
that a chunk is being written to, NAME.part, made at full length: its holder fetches that chunk, the others wait for
it; a part that no process holds was left by a crash and is deleted. A chunk gets its name when it is whole. Files with
other names than chunks have are not counted and not touched.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from node.files import FileLock, replace_file
from torch_bridge.objects.chunk_file import HEADER_BYTES, OpenChunk, open_chunk, write_chunk

OPEN_CHUNKS = 256
"""Kept open for each thread."""
_CHUNK = re.compile(r"[0-9a-f]{32}-\d+(\.part)?")
"""A hash and a number, as RangeReader names chunks."""
_LIMIT = re.compile(r"limit-(\d+)")
TOUCH_S = 5.0
"""A chunk's time of use is written at most this often by one process."""
_log = logging.getLogger(__name__)


@dataclass
class ChunkClaim:
    """The right to fetch a chunk, and room for it on the disk."""

    name: str
    length: int
    part: FileLock | None
    """Held on the file that the chunk is written to; None if there is no room, or no folder to write to."""


class ChunkCache:
    """It may be forked and pickled. Two runs with different limits keep to the smaller one as long as both run."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._begin()

    def _begin(self) -> None:
        self._mine = threading.local()
        self._checked: set[str] = set()
        self._limit: FileLock | None = None
        self._warned = False

    def sweep(self) -> None:
        """Delete what a crash left, and what is above the limit."""
        with self._guarded(), self._locked() as lock:
            self._make_room(lock, 0)

    def opened(self, name: str, length: int) -> OpenChunk | None:
        """A chunk to read from; None if it is not here. Its bytes are checked when a process first opens it."""
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
            if chunk.evicted:  # it takes disk space as long as it is open
                files.pop(key, None)
        return chunk

    def held(self) -> OrderedDict[tuple[str | None, int], OpenChunk]:
        """The chunks that this thread has open, by the two parts of their names. Callers do not change it."""
        try:
            return self._mine.files  # type: ignore[no-any-return]
        except AttributeError:
            files: OrderedDict[tuple[str | None, int], OpenChunk] = OrderedDict()
            self._mine.files = files
            return files

    def drop_evicted(self) -> None:
        """Close chunks that were evicted meanwhile: they take disk space until then."""
        files = self.held()
        for key in [key for key, chunk in files.items() if chunk.evicted]:
            files.pop(key)

    def claim(self, wanted: Mapping[str, int]) -> list[ChunkClaim]:
        """Of chunks by name and length, those that this caller has to fetch now: neither here nor being fetched. The
        caller ends each claim by `publish` or `abandon`.
        """
        claims: list[ChunkClaim] = []
        with self._guarded(), self._locked() as lock:
            for name, length in wanted.items():
                if (self.folder / name).exists():
                    continue
                cost = cost_of(HEADER_BYTES + length)
                with suppress(FileNotFoundError):
                    if _is_held(self._part(name)):
                        continue
                    self._remove(lock, f"{name}.part", cost)
                if not self._reserve(lock, cost):
                    claims.append(ChunkClaim(name, length, None))
                    continue
                part = FileLock(self._part(name))
                part.acquire()
                claims.append(ChunkClaim(name, length, part))
                os.ftruncate(part.fd, HEADER_BYTES + length)
            return claims
        # There is no folder to write to: all chunks without a claim are read without the cache.
        known = {claim.name for claim in claims}
        return claims + [ChunkClaim(name, length, None) for name, length in wanted.items() if name not in known]

    def publish(self, claim: ChunkClaim, data: bytes) -> None:
        """Keep a fetched chunk. If the disk does not take it, it is not kept, and one warning says so."""
        if claim.part is None:
            return
        with self._guarded():
            write_chunk(claim.part.fd, data)
            with self._locked():
                replace_file(self._part(claim.name), self.folder / claim.name)
                _release(claim)
        self.abandon(claim)

    def abandon(self, claim: ChunkClaim) -> None:
        """Give a claim back; does nothing if that was done already."""
        if claim.part is None:
            return
        with suppress(OSError), self._locked() as lock:
            self._remove(lock, f"{claim.name}.part", cost_of(HEADER_BYTES + claim.length))
        _release(claim)

    def wait(self, name: str) -> None:
        """Return when no process is fetching the chunk."""
        with suppress(OSError), FileLock(self._part(name), shared=True, create=False).held():
            pass

    # Under the folder's lock

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
        """Evict, and count again what the folder holds."""
        kept, pinned = [], 0
        for entry in os.scandir(self.folder):
            if not _CHUNK.fullmatch(entry.name):
                continue
            stat = entry.stat()
            if not entry.name.endswith(".part"):
                kept.append(CachedChunk(stat.st_mtime_ns, cost_of(stat.st_size), entry.name))
                continue
            if _is_held(Path(entry.path)):
                pinned += cost_of(stat.st_size)
            else:
                os.unlink(entry.path)
        going = evicted(kept, pinned, need, self._smallest_limit())
        for one in going or []:
            os.unlink(self.folder / one.name)
        total = pinned + sum(one.cost for one in kept) - sum(one.cost for one in going or [])
        os.pwrite(lock, total.to_bytes(8, "little"), 0)
        self.drop_evicted()
        return going is not None

    def _remove(self, lock: int, name: str, cost: int) -> None:
        os.unlink(self.folder / name)
        total = int.from_bytes(os.pread(lock, 8, 0), "little")
        os.pwrite(lock, max(0, total - cost).to_bytes(8, "little"), 0)

    def _smallest_limit(self) -> int:
        """Of all runs that have the folder open: each holds a lock on a file with its limit in the name."""
        limits = [self.limit_bytes]
        for entry in os.scandir(self.folder):
            if not (named := _LIMIT.fullmatch(entry.name)):
                continue
            if int(named[1]) == self.limit_bytes or _is_held(Path(entry.path)):
                limits.append(int(named[1]))
            else:
                os.unlink(entry.path)
        return min(limits)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the folder's lock. Gives the descriptor of its file, which holds the sum."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "lock")
        with lock.held():
            if self._limit is None or not self._limit.is_held:  # a forked child does not hold its parent's
                limit = FileLock(self.folder / f"limit-{self.limit_bytes}", shared=True)
                limit.acquire()
                self._limit = limit
            yield lock.fd

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("the cache in %s cannot be used (%s): reads continue without it", self.folder, error)

    def _discard(self, name: str) -> None:
        with self._guarded(), self._locked() as lock, suppress(FileNotFoundError):
            os.unlink(self.folder / name)
            self._make_room(lock, 0)

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}.part"

    def close(self) -> None:
        """Close this thread's files and withdraw the limit; the next use opens them again."""
        self._mine = threading.local()
        if self._limit is not None:
            self._limit.release()
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


def _is_held(path: Path) -> bool:
    """Whether a process holds the lock on a file. Raises FileNotFoundError."""
    lock = FileLock(path, create=False)
    if not lock.try_acquire():
        return True
    lock.release()
    return False


def _release(claim: ChunkClaim) -> None:
    if claim.part is not None:
        claim.part.release()
        claim.part = None


BLOCK_BYTES = 4096
"""File systems allocate whole blocks."""
SLACK = 20
"""1/20 of the limit is freed beyond what is needed, so that the next few chunks need no scan of the folder."""


class CachedChunk(NamedTuple):
    """A chunk's file."""

    used_ns: int
    """When it was last read, to TOUCH_S."""
    cost: int
    name: str


def cost_of(file_bytes: int) -> int:
    """Bytes that a file takes on the disk."""
    return -(-file_bytes // BLOCK_BYTES) * BLOCK_BYTES


def evicted(
    kept: Iterable[CachedChunk], pinned_bytes: int, need_bytes: int, limit_bytes: int
) -> list[CachedChunk] | None:
    """The chunks to delete, least recently read first, so that `need_bytes` fit beside the others and `pinned_bytes`
    (being written). Empty if there is room; None if deleting all of them would not make enough.
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
