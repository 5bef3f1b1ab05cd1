"""What tests of StreamingBatchDataset share: files at an origin, what a decode function reads, disk use sampled."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch_bridge import O3Client, RetryPolicy
from torch_bridge.batches.dataset import StreamingBatchDataset
from torch_bridge.core.store import Store

SIZE = 40_000


def bodies(count: int, size: int = SIZE) -> dict[str, bytes]:
    """Files by key, no two the same, of sizes around `size`."""
    pick = random.Random(count)
    return {f"clips/{number:03d}.bin": pick.randbytes(size - 7 * number) for number in range(count)}


def folder_of(folder: Path, files: dict[str, bytes]) -> Store:
    """The files as an origin of the kind file://."""
    for key, body in files.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return O3Client(retry=RetryPolicy(total_s=5.0)).at(folder.as_uri())


def name_and_body(path: Path, meta: Any) -> tuple[str, bytes, Any]:
    """A decode function."""
    return path.name, path.read_bytes(), meta


def only_name(path: Path, meta: Any) -> str:
    """Another, for loaders: that the file is here and not empty is asserted in the worker."""
    assert path.stat().st_size > 0
    return path.name


def dataset(source: Any, cache: Path, **others: Any) -> StreamingBatchDataset:
    """With small bounds."""
    return StreamingBatchDataset(
        source, cache, **({"cache_size": 4, "max_bytes": 10 * SIZE, "decode": only_name} | others)
    )


def bytes_here(cache: Path) -> tuple[int, int]:
    """Bytes and files under all consumers' folders now."""
    size = count = 0
    for home, _, names in os.walk(cache):
        for name in names if Path(home).parent.name == "files" else ():
            with suppress(FileNotFoundError):
                size, count = size + os.stat(os.path.join(home, name)).st_size, count + 1
    return size, count


def bytes_under(folder: Path) -> tuple[int, int]:
    """Bytes and files anywhere in a folder now."""
    size = count = 0
    for home, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size, count = size + os.stat(os.path.join(home, name)).st_size, count + 1
    return size, count


@contextmanager
def sampled(cache: Path, look_at: Callable[[Path], tuple[int, int]] = bytes_here) -> Iterator[list[tuple[int, int]]]:
    """Bytes and files there, again and again while the block runs."""
    found: list[tuple[int, int]] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.002):
            found.append(look_at(cache))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()
