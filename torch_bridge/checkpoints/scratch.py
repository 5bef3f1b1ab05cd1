"""Folders for the parts of a checkpoint while they are sent; those of processes that died are cleared away."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch_bridge.core.file_locks import FileLock

_PREFIX = "shoal-checkpoint-"
_LOCK = "lock"
_PARTS = "parts"


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """An empty folder under `parent`, deleted at the end. Raises OSError."""
    parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time:
        _clear_left_behind(parent)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = FileLock(folder / _LOCK)
        lock.take()
    try:
        parts = folder / _PARTS
        parts.mkdir()
        yield parts
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.leave()


def _clear_left_behind(parent: Path) -> None:
    """Those that nobody holds. One without a lock is being made at this moment, or is no loss."""
    for folder in parent.glob(f"{_PREFIX}*"):
        lock = FileLock(folder / _LOCK)
        try:
            if not (folder / _LOCK).exists() or not lock.take():
                continue
        except OSError:
            continue  # another user's
        shutil.rmtree(folder, ignore_errors=True)
        lock.leave()


_one_at_a_time = threading.Lock()
