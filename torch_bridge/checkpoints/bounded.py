"""Work in threads, in order, and a few items ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
K = TypeVar("K")
IN_FLIGHT = 4
"""Items in memory and on their way at a time, of each rank."""


def in_order(pool: ThreadPoolExecutor, work: Callable[[K], T], items: Iterable[K], ahead: int) -> Iterator[tuple[K, T]]:
    """Each item with what `work` gives for it, in order, at most `ahead` of them begun and not taken."""
    waiting: deque[tuple[K, Future[T]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) >= ahead:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()
    finally:
        for _, result in waiting:
            result.cancel()
