"""Free and reserved disk space, and the errors of a full disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from protocol.errors import InsufficientDiskError

log = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT)
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE of fallocate(2): room behind the file's end that does not change its size."""
_STAT_BYTES = 512
"""Unit of st_blocks, stat(2)."""
BLOCK_BYTES = 4096
"""File systems allocate whole blocks."""
_reserving = threading.Lock()


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write there."""
    seen = os.statvfs(folder)
    return seen.f_bavail * seen.f_frsize


def blocks(size: int) -> int:
    """Bytes that a file of that size takes on the disk."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def allocated_bytes(path: Path | os.DirEntry[str]) -> int:
    """Bytes of the blocks that a file takes, as `du` counts them; 0 if it is gone."""
    try:
        return path.stat(follow_symlinks=False).st_blocks * _STAT_BYTES
    except FileNotFoundError:
        return 0


def require_space(folder: Path, needed: int, kept: int, what: str) -> None:
    """Raises InsufficientDiskError if less than `kept` bytes would stay free after `needed` more."""
    free = free_bytes(folder)
    if free - needed < kept:
        raise InsufficientDiskError(
            f"{what} needs {needed} bytes more in {folder}; {free} are free, {kept} are kept free: "
            "free some, or keep fewer shards",
            {"free_bytes": free, "needed_bytes": needed},
        )


class FreeSpace:
    """Whether there is room for one more download. Not thread-safe. Its `str()` says how much is free."""

    def __init__(self, folder: Path, warn_bytes: int, stop_bytes: int) -> None:
        self._folder, self._warn_bytes, self._stop_bytes = folder, warn_bytes, stop_bytes
        self._warned = False
        self._full_since: float | None = None

    def is_enough(self) -> bool:
        """Whether `stop_bytes` are free. Below `warn_bytes` it warns once."""
        free = self.free_bytes()
        if free < self._warn_bytes and not self._warned:
            self._warned = True
            log.warning("%s has %d bytes free: below %d no shard is fetched", self._folder, free, self._stop_bytes)
        if free >= self._stop_bytes:
            self._full_since = None
            return True
        self._full_since = self._full_since or time.monotonic()
        return False

    @property
    def full_s(self) -> float:
        """For how many seconds there has been too little; 0 if there is enough."""
        return time.monotonic() - self._full_since if self._full_since else 0.0

    def free_bytes(self) -> int:
        return free_bytes(self._folder)

    def __str__(self) -> str:
        return (
            f"{self.free_bytes()} bytes are free in {self._folder}, below {self._stop_bytes}; free some, or lower "
            "stop_free_bytes or keep_behind"
        )


@contextlib.contextmanager
def disk_full_errors(folder: Path) -> Iterator[None]:
    """Raise InsufficientDiskError in place of the OSError of a full disk."""
    try:
        yield
    except OSError as err:
        if err.errno not in FULL:
            raise
        raise InsufficientDiskError(f"the disk of {folder} is full: free some") from None


def reserve(part: Path, size: int, kept: int, what: str) -> None:
    """Reserve room for `size` bytes in the file `part`, created if it does not exist. Bytes that it holds stay, unless
    they are more than `size`. The reservation is the file system's, so that no download of any process takes the room;
    a file system without reservations (NFS) is only asked how much is free.

    Raises InsufficientDiskError, and then deletes a file that was created here.
    """
    with _reserving, part.open("ab") as file:
        seen = os.fstat(file.fileno())
        if seen.st_size > size:
            file.truncate(0)
            seen = os.fstat(file.fileno())
        try:
            require_space(part.parent, max(size - seen.st_blocks * _STAT_BYTES, 0), kept, what)
            if size and _allocate(file.fileno(), size) in FULL:
                raise InsufficientDiskError(f"the disk of {part.parent} is full: {what} needs {size} bytes; free some")
        except InsufficientDiskError:
            if not seen.st_size:
                part.unlink(missing_ok=True)
            raise


def release(part: Path) -> None:
    """Release what was reserved and not written; an empty file is deleted."""
    with contextlib.suppress(FileNotFoundError):
        if size := part.stat().st_size:
            os.truncate(part, size)
        else:
            part.unlink()


def _allocate(fd: int, size: int) -> int:
    """Returns the errno; 0 also if this system has no fallocate."""
    try:
        call = ctypes.CDLL(None, use_errno=True).fallocate
    except (AttributeError, OSError):
        return 0
    failed = call(ctypes.c_int(fd), ctypes.c_int(_KEEP_SIZE), ctypes.c_int64(0), ctypes.c_int64(size))
    return ctypes.get_errno() if failed else 0
