"""A state goes through JSON and named tensors and comes back equal, or is refused by name."""

import enum
import json
import math
import random

import pytest
import torch

from torch_bridge.checkpoints.state import InvalidStructureError, UnsayableStateError, flatten, rebuild


def _through_json(state: object) -> object:
    flat = flatten(state)
    return rebuild(json.loads(json.dumps(flat.structure, allow_nan=False)), flat.tensors)


def test_an_optimizer_s_state_comes_back_equal() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    back = _through_json(state)
    assert isinstance(back, dict)
    assert back["param_groups"] == state["param_groups"]
    assert list(back["state"]) == [0, 1]
    assert torch.equal(back["state"][0]["exp_avg"], state["state"][0]["exp_avg"])


@pytest.mark.parametrize(
    "state",
    [
        random.Random(7).getstate(),
        {"$": "tensor", "v": "x"},
        {1: "a", "1": "b"},
        {"b": b"\x00\xff", "none": None, "inf": [math.inf, -math.inf], "flag": True, "big": 2**200, "t": ((), [])},
    ],
)
def test_what_json_cannot_say_comes_back_with_its_type(state: object) -> None:
    back = _through_json(state)
    assert back == state
    assert repr(back) == repr(state)


@pytest.mark.parametrize("hostile", [object(), {1, 2}, enum.IntEnum("E", "A").A, lambda: None])  # type: ignore[attr-defined]
def test_what_only_pickle_could_keep_is_refused_by_its_path(hostile: object) -> None:
    with pytest.raises(UnsayableStateError, match="extra/1"):
        flatten({"extra": [0, hostile]})


def test_two_tensors_of_one_path_are_refused() -> None:
    with pytest.raises(UnsayableStateError, match="a/b"):
        flatten({"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)})


@pytest.mark.parametrize(
    "damaged",
    [{"$": "tensor", "v": "gone"}, {"$": "code", "v": "x"}, {"$": "dict", "v": [[True, 1]]}, {"$": "bytes", "v": "?"}],
)
def test_a_damaged_structure_is_refused(damaged: object) -> None:
    with pytest.raises(InvalidStructureError):
        rebuild(damaged, {})  # type: ignore[arg-type]


def test_tensors_without_values_or_of_a_kind_that_would_not_come_back_are_refused() -> None:
    with pytest.raises(UnsayableStateError, match="'model/w' is on the meta device"):
        flatten({"w": torch.ones(3, device="meta")}, "model")
    with pytest.raises(UnsayableStateError, match=r"'model/w' is of torch.complex128"):
        flatten({"w": torch.ones(3, dtype=torch.complex128)}, "model")
