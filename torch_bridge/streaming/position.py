"""Where a reader of an epoch stands, as it travels in a checkpoint, and whether it can be continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protocol.errors import InvalidParamsError
from torch_bridge.streaming.order import OrderSettings

VERSION = 1
_SAME = ("batch_size", "seed", "shuffle", "lanes", "block_rows", "window", "drop_last")


@dataclass(frozen=True)
class ReaderId:
    """This rank and worker among all."""

    rank: int = 0
    ranks: int = 1
    worker: int = 0
    workers: int = 1


@dataclass(frozen=True)
class ReaderPosition:
    """All batches before `base` are read; from there on all readers take turns, and this one has read `own`."""

    base: int = 0
    own: int = 0
    first_worker: int = 0
    """The worker that has the first turn: a StatefulDataLoader that continues asks the one after the last one first."""


@dataclass(frozen=True)
class EpochPosition:
    """A position in an epoch."""

    epoch: int
    position: ReaderPosition = ReaderPosition()


def saved(
    position: ReaderPosition, reader: ReaderId, settings: OrderSettings, shards: Mapping[str, str], *, finished: bool
) -> dict[str, Any]:
    """JSON-able. `shards`: content id by name. `finished`: the reader has no batch left; others may have one."""
    return {
        "version": VERSION,
        "epoch": settings.epoch,
        **{name: getattr(settings, name) for name in _SAME},
        "shards": dict(shards),
        "base": position.base,
        "own": position.own,
        "first_worker": position.first_worker,
        "ranks": reader.ranks,
        "worker": reader.worker,
        "workers": reader.workers,
        "finished": finished,
    }


def continued(
    state: Mapping[str, Any], reader: ReaderId, settings: OrderSettings, shards: Mapping[str, str]
) -> ReaderPosition:
    """The position to continue at. Raises InvalidParamsError, which names the difference, if none is exact."""
    if state.get("version") != VERSION:
        raise InvalidParamsError(f"the state has version {state.get('version')}, this release reads {VERSION}")
    for name in _SAME:
        if state[name] != getattr(settings, name):
            raise InvalidParamsError(
                f"the state was saved with {name}={state[name]}, the data set has {getattr(settings, name)}: "
                "that is another order; set it to the same, or begin a new epoch"
            )
    if state["shards"] != dict(shards):
        names = [name for name in {*state["shards"], *shards} if state["shards"].get(name) != shards.get(name)]
        raise InvalidParamsError(
            f"{len(names)} shards differ from those of the state (the first: {min(names)}): its epoch can only be "
            "continued over the same data set"
        )
    if state["workers"] == 1:
        return ReaderPosition(int(state["base"]) + int(state["own"]) * int(state["ranks"]))
    if (state["ranks"], state["workers"], state["worker"]) != (reader.ranks, reader.workers, reader.worker):
        raise InvalidParamsError(
            f"the state is one of worker {state['worker']} of {state['workers']} on {state['ranks']} ranks, this is "
            f"worker {reader.worker} of {reader.workers} on {reader.ranks}: for others save "
            "state_at(batches) instead"
        )
    return ReaderPosition(int(state["base"]), int(state["own"]), int(state.get("first_worker", 0)))
