"""Free disk space: what is left, and errors that say so."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from protocol.errors import InsufficientDiskError

FULL = (errno.ENOSPC, errno.EDQUOT)


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
