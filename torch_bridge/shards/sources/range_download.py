"""Download a shard from one store into a file: a few ranges at a time, written in order, resumed after a crash."""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import CancelledError, Future
from pathlib import Path

from protocol.content import ContentHasher
from protocol.errors import CancelledRequestError, InsufficientDiskError
from protocol.manifest import ShardEntry
from torch_bridge.core.loop_thread import loop_thread
from torch_bridge.core.store import Store
from torch_bridge.shards.disk_space import FULL
from torch_bridge.shards.sources.interface import OnProgress

FIRST_RANGE_BYTES = 1 << 20
"""Short, so that it is written and hashed while the rest is on its way; each further one is twice as long."""
RANGE_BYTES = 8 << 20
AT_ONCE = 4
"""Ranges in memory at a time: 32 MiB a shard."""
_READ_BYTES = 1 << 20
_LOOK_S = 0.2


def download(
    store: Store, key: str, entry: ShardEntry, part: Path, stop: threading.Event | None, on_progress: OnProgress | None
) -> tuple[str, int]:
    """Download the first `entry.size` bytes of an object into `part`. Returns its content id, and the bytes moved.

    Bytes that `part` holds already are kept and hashed. Raises OriginError, InsufficientDiskError if the disk is full
    (`part` is deleted then, to free the space), CancelledRequestError.
    """
    hasher = ContentHasher(entry.size)
    ahead: deque[Future[bytes]] = deque()
    moved = 0
    with part.open("a+b", buffering=0) as file:  # no bytes stay in a buffer that a full disk would refuse
        file.seek(0)
        if os.fstat(file.fileno()).st_size > entry.size:
            file.truncate(0)
        while block := file.read(_READ_BYTES):
            hasher.update(block)
        asked, length = hasher.seen, min(FIRST_RANGE_BYTES, RANGE_BYTES)
        try:
            while hasher.seen < entry.size:
                while asked < entry.size and len(ahead) < AT_ONCE:
                    end = min(asked + length, entry.size)
                    ahead.append(loop_thread().submit(store.aio.get_range(key, asked, end)))
                    asked, length = end, min(2 * length, RANGE_BYTES)
                body = _wait(ahead[0], stop, entry.filename)
                ahead.popleft()
                left = memoryview(body)
                while left:
                    left = left[file.write(left) :]
                hasher.update(body)
                moved += len(body)
                if on_progress:
                    on_progress(hasher.seen, entry.size)
        except OSError as err:
            if err.errno not in FULL:
                raise
            part.unlink(missing_ok=True)
            raise InsufficientDiskError(
                f"the disk of {part.parent} is full: {entry.filename} needs {entry.size} bytes; free some, or keep "
                "fewer shards"
            ) from None
        finally:
            for future in ahead:
                future.cancel()
    return hasher.result().content_id, moved


def _wait(future: Future[bytes], stop: threading.Event | None, what: str) -> bytes:
    while True:
        if stop is not None and stop.is_set():
            raise CancelledRequestError(f"the download of {what} was stopped here; the bytes that came are kept")
        try:
            return future.result(timeout=_LOOK_S)
        except CancelledError:
            raise CancelledRequestError(f"the download of {what} was cancelled") from None
        except TimeoutError:
            if future.done():
                raise
