"""Files replaced whole, made durable, locked: the only module that calls `os.replace`, `os.fsync` and `flock`.

Three durabilities, by what a reader may find afterwards. In all of them it finds the old file or the new one, never a
half of either, and what an interrupted write leaves is a hidden file that ends in `.tmp`.

"process"   survives the end of this process. After a power cut the new name may hold zeros or nothing: for what is
            checked when it is read, or can be fetched again.
"contents"  the bytes are on the disk before the name is: after a power cut the old file or the new one, whole.
"name"      the folder is on the disk too: when the call returns, a power cut leaves the new file.

The names of files that are not finished are here too, since the swarm's part files are what the shards room adopts,
continues and deletes.

Everything here blocks on the disk: call it from a thread.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from protocol.errors import CancelledRequestError

Durability = Literal["process", "contents", "name"]

TEMPORARY_SUFFIX = ".tmp"
PART_SUFFIX = ".part"
INVALID_SUFFIX = ".invalid"
UNFINISHED_SUFFIXES = (PART_SUFFIX, TEMPORARY_SUFFIX, ".temp", ".partial", ".crdownload", INVALID_SUFFIX)
"""Of our own and other programs' downloads in progress, and of files that were set aside: not shards."""
POLL_S = 0.05


def part_path(path: Path) -> Path:
    """Where a download to `path` is written until it is whole: by the swarm, which allocates all of it at the start."""
    return path.with_name(path.name + PART_SUFFIX)


def whole_part_path(path: Path) -> Path:
    """Where a shard that an origin gives whole is written: its length is what came, and the swarm leaves it alone."""
    return path.with_name(path.name + ".whole" + PART_SUFFIX)


def invalid_path(path: Path) -> Path:
    """Where a file that was in the way of a download to `path`, or was found wrong, is set aside."""
    return path.with_name(path.name + INVALID_SUFFIX)


@contextmanager
def atomic_file(path: Path, durability: Durability = "process", *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a new file that takes the name `path` if the block ends well, and is removed if it does not.

    `mode` is the permission of the new file, less the process's umask. Raises OSError.
    """
    temporary = path.with_name(f".{path.name[:60]}-{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
        replace_file(temporary, path, durability)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def atomic_write(path: Path, data: bytes | str, durability: Durability = "process", *, mode: int = 0o666) -> None:
    """Replace the file at `path` by one that holds `data`; text is written as UTF-8. Raises OSError."""
    with atomic_file(path, durability, mode=mode) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def replace_file(source: Path, target: Path, durability: Durability = "process") -> Path:
    """Give a finished file another name on the same disk, in place of whatever has it. Returns `target`.

    Raises OSError, IsADirectoryError among them.
    """
    if durability != "process":
        fsync_file(source)
    os.replace(source, target)
    if durability == "name":
        fsync_dir(target.parent)
        if source.parent != target.parent:
            fsync_dir(source.parent)
    return target


def fsync_file(path: Path) -> None:
    """Have the bytes of a file on the disk."""
    _fsync(path, os.O_RDONLY)


def fsync_dir(path: Path) -> None:
    """Have the names in a folder on the disk."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells a file from its former self without reading it."""

    size: int
    """Bytes."""
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Fingerprint | None:
        """None unless `path` is a regular file that can be reached."""
        try:
            found = path.stat()
        except OSError:
            return None
        return cls(found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


class FileLock:
    """A lock between processes, held on a file that stays, or on a folder that exists (flock(2)).

    The kernel releases it however a process ends. A forked child does not hold its parent's lock. `write_pid` writes
    the process id into the file, for `holder`. `mode` is the permission of a new file, less the process's umask.
    Without `create`, a file that does not exist is FileNotFoundError.
    """

    def __init__(
        self, path: Path, *, shared: bool = False, create: bool = True, write_pid: bool = False, mode: int = 0o666
    ) -> None:
        self._path = path
        self._operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        self._write_pid = write_pid
        self._mode = mode
        self._fd: int | None = None
        self._waiting_fd: int | None = None
        """Open for a lock that another process may still hold."""
        _all_locks.add(self)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    @property
    def fd(self) -> int:
        """The descriptor of the file, which this object keeps: for what the lock guards, if that is in the file.

        Raises RuntimeError if the lock is not held.
        """
        if self._fd is None:
            raise RuntimeError(f"the lock on {self._path} is not held")
        return self._fd

    def try_acquire(self) -> bool:
        """Whether the lock is held now; does not wait. Raises OSError if the file cannot be opened."""
        return self._acquire(fcntl.LOCK_NB)

    def _acquire(self, wait: int) -> bool:
        if self._fd is not None:
            raise RuntimeError(f"the lock on {self._path} is held already")
        flags = os.O_RDONLY | os.O_CLOEXEC if self._path.is_dir() else self._flags
        self._waiting_fd = fd = os.open(self._path, flags, self._mode)
        try:
            fcntl.flock(fd, self._operation | wait)
            if self._write_pid:
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        finally:
            self._waiting_fd = None
        self._fd = fd
        return True

    def acquire(self, stop: threading.Event | None = None, timeout_s: float | None = None) -> None:
        """Wait for the lock: as the kernel wakes this thread, or looking every POLL_S if `stop` or a time is given.

        Raises CancelledRequestError if `stop` is set meanwhile, TimeoutError after `timeout_s` seconds, OSError if the
        file cannot be opened.
        """
        if stop is None and timeout_s is None:
            self._acquire(0)
            return
        give_up_at = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.try_acquire():
            if stop is not None and stop.is_set():
                raise CancelledRequestError(f"stopped while waiting for the lock on {self._path.name}")
            if give_up_at is not None and time.monotonic() >= give_up_at:
                raise TimeoutError(f"{self._path} is locked by another process for {timeout_s:g} s")
            time.sleep(POLL_S)

    def release(self) -> None:
        """Release the lock; does nothing if it is not held."""
        fd, self._fd = self._fd, None
        if fd is not None:
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was just forked may still have the descriptor
            os.close(fd)

    def holder(self) -> str:
        """The process id that a lock with `write_pid` names, or "unknown"."""
        with suppress(OSError):
            return self._path.read_bytes()[:32].decode(errors="replace").strip() or "unknown"
        return "unknown"

    def drop_in_child(self) -> None:
        """In a forked child: close the copy of the descriptor, which does not end the parent's lock."""
        for fd in (self._fd, self._waiting_fd):
            if fd is not None:
                os.close(fd)
        self._fd = self._waiting_fd = None

    @contextmanager
    def held(self, stop: threading.Event | None = None, timeout_s: float | None = None) -> Iterator[None]:
        """Hold the lock for the length of the block; waits and raises as `acquire` does."""
        self.acquire(stop, timeout_s)
        try:
            yield
        finally:
            self.release()


_all_locks: weakref.WeakSet[FileLock] = weakref.WeakSet()


def is_held_here(path: Path) -> bool:
    """Whether this process itself holds the lock on a file."""
    return any(lock.is_held and lock.path.absolute() == path.absolute() for lock in list(_all_locks))


def _drop_all_in_child() -> None:
    for lock in list(_all_locks):
        lock.drop_in_child()


os.register_at_fork(after_in_child=_drop_all_in_child)


class DataDirInUseError(RuntimeError):
    """Raised when another process holds the lock of a data directory; the message names it."""


@contextmanager
def data_dir_lock(data_dir: Path) -> Iterator[None]:
    """Hold DATA_DIR/lock: one daemon for each data directory. Raises DataDirInUseError."""
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(data_dir / "lock", write_pid=True, mode=0o600)
    if not lock.try_acquire():
        raise DataDirInUseError(
            f"the data directory {data_dir} is used by another node (process {lock.holder()}); "
            "stop it, or give this one its own --data-dir"
        )
    try:
        yield
    finally:
        lock.release()
