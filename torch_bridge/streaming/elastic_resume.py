"""Which batches ranks had read when they stopped, so that any other number of ranks can read the rest. Pure.

Batches of documents are numbered through an epoch. Of ranks that began at batch `base`, rank r reads base + r,
base + r + ranks, and so on; texts differ in length, so ranks get to different batches. Unread is every batch that its
rank had not reached: the ranks that continue take turns over all batches from the first unread one, and skip those that
were read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RankProgress:
    """How far each of some ranks was in one epoch."""

    epoch: int
    base: int
    """The batch at which those ranks began: all batches before it are read."""
    following: tuple[int, ...]
    """By rank: the batch that it would have begun next; it has read all of its batches before that."""

    def has(self, number: int) -> bool:
        """Whether the batch was read."""
        if number < self.base:
            return True
        return number < self.following[(number - self.base) % len(self.following)]


@dataclass(frozen=True)
class PartialBatch:
    """A batch of documents whose first tokens were read."""

    epoch: int
    number: int
    used_tokens: int
    next_tokens: tuple[int, ...]
    """To notice another tokeniser."""


@dataclass(frozen=True)
class Remainder:
    """What another number of ranks read of a data set, over all its epochs."""

    passed: tuple[RankProgress, ...] = ()
    begun: tuple[PartialBatch, ...] = ()

    def has(self, epoch: int, number: int) -> bool:
        """Whether a batch is to be skipped."""
        return any(one.epoch == epoch and one.has(number) for one in self.passed)

    def begun_at(self, epoch: int, number: int) -> PartialBatch | None:
        return next((one for one in self.begun if (one.epoch, one.number) == (epoch, number)), None)

    def first(self) -> tuple[int, int]:
        """The epoch to continue in, and the first batch: all before it are read."""
        epoch = min((one.epoch for one in self.passed), default=0)
        return epoch, max((min(one.following) for one in self.passed if one.epoch == epoch), default=0)

    def behind(self, epoch: int, number: int) -> Remainder:
        """The part of it that matters to a rank that is about to begin that batch."""
        return Remainder(
            tuple(one for one in self.passed if (one.epoch, max(one.following)) > (epoch, number)),
            tuple(one for one in self.begun if (one.epoch, one.number) >= (epoch, number)),
        )

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"passed": [asdict(one) for one in self.passed], "begun": [asdict(one) for one in self.begun]}

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> Remainder:
        """From the result of `state`."""
        if not state:
            return cls()
        passed = (RankProgress(one["epoch"], one["base"], tuple(one["following"])) for one in state["passed"])
        begun = (
            PartialBatch(one["epoch"], one["number"], one["used_tokens"], tuple(one["next_tokens"]))
            for one in state["begun"]
        )
        return cls(tuple(passed), tuple(begun))


def following(dataset: Mapping[str, Any], rank: int) -> int:
    """The number of the batch that comes next after a data set's state, on this rank."""
    return int(dataset["base"]) + rank + int(dataset["own"]) * int(dataset["ranks"])


def left_by(states: Sequence[Mapping[str, Any]], batches: Callable[[int], int]) -> Remainder:
    """From the states of all ranks, in their order, saved at one moment. `batches`: of an epoch, those of all ranks."""
    epochs = [int(state["dataset"]["epoch"]) for state in states]
    places = [following(state["dataset"], rank) for rank, state in enumerate(states)]
    passed = []
    for epoch in range(min(epochs), max(epochs) + 1):
        # If each rank was continued by itself, their bases differ by multiples of their number.
        base = min(
            (int(state["dataset"]["base"]) for state, at in zip(states, epochs, strict=True) if at == epoch), default=0
        )
        come_to = [
            place if at == epoch else batches(epoch) if at > epoch else base + rank
            for rank, (at, place) in enumerate(zip(epochs, places, strict=True))
        ]
        passed.append(RankProgress(epoch, base, tuple(come_to)))
    begun = [
        PartialBatch(at, place, int(state["used_tokens"]), tuple(state["next_tokens"]))
        for state, at, place in zip(states, epochs, places, strict=True)
    ]
    before = [Remainder.of(state.get("left")) for state in states]
    now = Remainder(tuple(passed), tuple(begun))
    untouched = [
        one
        for each in before
        for one in each.begun
        if not now.has(one.epoch, one.number) and now.begun_at(one.epoch, one.number) is None
    ]
    still = [one for each in before for one in each.passed if one.epoch >= min(epochs)]
    return Remainder(tuple(dict.fromkeys([*passed, *still])), tuple(dict.fromkeys([*begun, *untouched])))
