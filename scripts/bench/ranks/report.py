"""What scripts.bench.ranks finds, counted and told: without I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOAL = 1.1
"""Payload out of the origin, over the data, if every rank has a node of its own."""


@dataclass(frozen=True)
class Samples:
    """What all ranks saw together."""

    seen: int
    missing: int
    twice: int
    """Those that the data set has not are counted among them."""

    @property
    def right(self) -> bool:
        return not (self.missing or self.twice)


@dataclass(frozen=True)
class Outcome:
    """One row: all began at once."""

    what: str
    ranks: int
    samples: Samples
    seconds: float
    """Until the last was through."""
    first_s: float
    """Until the last had its first batch."""
    origin_bytes: int
    """Payload that left the origin since the nodes started."""
    peer_bytes: int
    """Payload that nodes sent each other."""
    most_on_disk: int
    """Of any node's folder, or any rank's without nodes."""
    each: list[dict[str, Any]] = field(default_factory=list)
    """What each rank said."""


def tally(ids: Sequence[NDArray[np.int64]], samples: int) -> Samples:
    """Of samples 0 to `samples` - 1, by the ids that each rank saw."""
    seen = np.bincount(np.concatenate([np.empty(0, np.int64), *ids]), minlength=samples)
    doubled = (seen[:samples] > 1).sum() + (seen[samples:] > 0).sum()
    return Samples(int(seen.sum()), int((seen[:samples] == 0).sum()), int(doubled))


def table(outcomes: Sequence[Outcome], size: int) -> str:
    """As markdown; bytes as multiples of the data."""
    lines = [
        "| from | N | origin sent | nodes sent | samples | missing | twice | first batch, s | all, s | most on disk |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {one.what} | {one.ranks} | {one.origin_bytes / size:.3f} | {one.peer_bytes / size:.2f} | "
        f"{one.samples.seen:,} | {one.samples.missing} | {one.samples.twice} | {one.first_s:.1f} | {one.seconds:.1f} | "
        f"{one.most_on_disk / size:.2f} |"
        for one in outcomes
    ]
    return "\n".join(lines)


def verdict(outcomes: Sequence[Outcome], size: int) -> str:
    """Of the goal, and of the samples."""
    worst = max((one.origin_bytes / size for one in outcomes if one.what == "node each"), default=None)
    words = "The goal was not measured."
    if worst is not None:
        words = f"With a node each the origin sent at most {worst:.3f} times the data (goal {GOAL}: "
        words += "reached)." if worst <= GOAL else "missed)."
    wrong = [f"{one.what}, N={one.ranks}" for one in outcomes if not one.samples.right]
    return f"{words} {'Samples were lost or doubled: ' + '; '.join(wrong) if wrong else 'Each sample came once.'}"
