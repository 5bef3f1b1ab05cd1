"""How many shards to keep ahead, from what was measured: a pure function."""

from __future__ import annotations

import math


def adapted_size(now: int, smallest: int, largest: int, download_s: float, consume_s: float) -> int:
    """The next buffer size, in shards, one step from `now`.

    While one shard is consumed in `consume_s`, one is downloaded in `download_s`: to hide a download takes
    download_s / consume_s shards, and one more for what varies. 0 s means not measured yet.
    """
    if download_s <= 0 or consume_s <= 0:
        return min(max(now, smallest), largest)
    wanted = math.ceil(min(download_s / consume_s, float(largest))) + 1
    step = (wanted > now) - (wanted < now)
    return min(max(now + step, smallest), largest)


def smoothed(before: float, measured: float, weight: float = 0.3) -> float:
    """A running mean that follows; the first measurement as it is."""
    return measured if before <= 0 else before + weight * (measured - before)
