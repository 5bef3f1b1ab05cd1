"""Giving the states of a checkpoint to the objects of a training: to all of them, or to none."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol, TypeAlias

import torch


class Stateful(Protocol):
    """A model, optimizer, scheduler or loader."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


StateOf: TypeAlias = "Stateful | MutableMapping[str, Any]"
"""An object with a state, or the state itself: a dict, which a restore clears and fills."""


def load_all(wanted: Mapping[str, StateOf], states: Mapping[str, Any]) -> None:
    """Give each object the state of its name. If one of them raises, all of them have their old state again.

    Modules come last: they copy a state into their own memory, name by name, and what was there is gone.

    Raises what `load_state_dict` of any of them raises.
    """
    begun: list[tuple[StateOf, Any]] = []
    try:
        for name, one in sorted(wanted.items(), key=lambda item: isinstance(item[1], torch.nn.Module)):
            begun.append((one, _old_state(one, states[name])))
            _load(one, states[name])
    except BaseException:
        for one, old in reversed(begun):
            if old is not None:
                _load(one, old)
        raise


def _load(one: StateOf, state: Any) -> None:
    if isinstance(one, MutableMapping):
        one.clear()
        one.update(state)
    else:
        one.load_state_dict(state)


def _old_state(one: StateOf, new: Mapping[str, Any]) -> Any:
    """What brings it back to where it is. None for a module that the new state fits, which needs no second copy."""
    if isinstance(one, MutableMapping):
        return dict(one)
    if not isinstance(one, torch.nn.Module):
        return one.state_dict()
    own = one.state_dict()
    if _shapes(own) == _shapes(new):
        return None
    return {key: value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value for key, value in own.items()}


def _shapes(state: Mapping[str, Any]) -> dict[str, torch.Size | None]:
    return {key: value.shape if isinstance(value, torch.Tensor) else None for key, value in state.items()}
