"""Free disk space: what is left, what is reserved, and errors that say so."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path

from protocol.errors import InsufficientDiskError

FULL = (errno.ENOSPC, errno.EDQUOT)
_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE of fallocate(2): room behind the file's end, which the size does not tell."""
_BLOCK_BYTES = 512
"""Unit of st_blocks, stat(2)."""
_reserving = threading.Lock()


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write there."""
    seen = os.statvfs(folder)
    return seen.f_bavail * seen.f_frsize


def require_space(folder: Path, needed: int, kept: int, what: str) -> None:
    """Raises InsufficientDiskError where less than `kept` bytes would stay free after `needed` more."""
    free = free_bytes(folder)
    if free - needed < kept:
        raise InsufficientDiskError(
            f"{what} needs {needed} bytes more in {folder}, where {free} are free and {kept} are kept free: "
            "free some, or keep fewer shards",
            {"free_bytes": free, "needed_bytes": needed},
        )


def reserve(part: Path, size: int, kept: int, what: str) -> None:
    """Have room for `size` bytes in `part`, made where it is not there; what it holds already stays, unless that is
    too much. The room is the file system's own reservation, so that no other download, of whatever process, takes it;
    a file system that has none (NFS) is only asked how much is free.

    Raises InsufficientDiskError; a file that was made here is gone then.
    """
    with _reserving, part.open("ab") as file:
        seen = os.fstat(file.fileno())
        if seen.st_size > size:
            file.truncate(0)
            seen = os.fstat(file.fileno())
        try:
            require_space(part.parent, max(size - seen.st_blocks * _BLOCK_BYTES, 0), kept, what)
            if size and _allocate(file.fileno(), size) in FULL:
                raise InsufficientDiskError(f"the disk of {part.parent} is full: {what} needs {size} bytes; free some")
        except InsufficientDiskError:
            if not seen.st_size:
                part.unlink(missing_ok=True)
            raise


def _allocate(fd: int, size: int) -> int:
    """The errno; 0 also where this system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).fallocate
    except (AttributeError, OSError):
        return 0
    failed = call(ctypes.c_int(fd), ctypes.c_int(_KEEP_SIZE), ctypes.c_int64(0), ctypes.c_int64(size))
    return ctypes.get_errno() if failed else 0
