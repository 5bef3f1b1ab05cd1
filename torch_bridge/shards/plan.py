"""Which shard is fetched next: a pure function."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def next_to_fetch(
    order: Sequence[str],
    *,
    pinned: Sequence[str],
    here: Collection[str],
    on_the_way: Collection[str],
    consumed: Collection[str],
    not_now: Collection[str],
    wanted: Collection[str],
    ahead: int,
) -> str | None:
    """A file name, or None where nothing is to be begun now.

    Pinned shards come first, then what somebody waits for, then the order, as long as fewer than `ahead` shards of it
    are here or on their way and not consumed. `not_now` failed, and is for later or for ever.
    """
    taken = {*here, *on_the_way, *not_now}
    for name in (*pinned, *wanted):
        if name not in taken:
            return name
    window = 0
    for name in order:
        if name in consumed:
            continue
        if window >= ahead:
            return None
        if name not in taken:
            return name
        window += name not in not_now
    return None
