"""A state goes through JSON and named tensors and comes back equal, or is refused by name."""

import enum
import json
import math
import os
import random
from collections import Counter, OrderedDict, defaultdict
from types import MappingProxyType

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
        {"milestones": Counter({2: 1, 4: 3}), "empty": Counter()},
        OrderedDict(b=1, a=OrderedDict()),
        {os.fsdecode(b"l\xf6ffel"): os.fsdecode(b"l\xf6ffel.bin"), "half": "\ud800"},
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


@pytest.mark.parametrize("mapping", [defaultdict(list, a=[1]), MappingProxyType({"a": 1})])
def test_a_mapping_that_would_come_back_as_a_dict_is_refused(mapping: object) -> None:
    with pytest.raises(UnsayableStateError, match=r"'extra/m' is a .* which would come back as a dict"):
        flatten({"extra": {"m": mapping}})


def test_an_integer_that_no_json_reader_takes_is_refused() -> None:
    assert _through_json({"n": 10**4000}) == {"n": 10**4000}
    with pytest.raises(UnsayableStateError, match="'n' is an integer of 16610 bits"):
        flatten({"n": 10**5000})


def test_a_module_s_state_keeps_the_versions_of_its_layers() -> None:
    state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()
    back = _through_json({"model": state})
    assert isinstance(back, dict)
    assert type(back["model"]) is OrderedDict
    assert back["model"]._metadata == state._metadata  # type: ignore[attr-defined]


def test_tensors_under_a_name_that_is_no_utf_8_come_back_under_it() -> None:
    name = os.fsdecode(b"l\xf6ffel")
    back = _through_json({name: torch.ones(2)})
    assert isinstance(back, dict)
    assert list(back) == [name]
    with pytest.raises(UnsayableStateError, match="two tensors"):
        flatten({name: torch.ones(1), name.encode("utf-8", "backslashreplace").decode(): torch.ones(1)})


def test_two_tensors_of_one_path_are_refused() -> None:
    with pytest.raises(UnsayableStateError, match="a/b"):
        flatten({"a": {"b": torch.ones(1)}, "a/b": torch.ones(1)})


@pytest.mark.parametrize(
    "damaged",
    [
        {"$": "tensor", "v": "gone"},
        {"$": "code", "v": "x"},
        {"$": "dict", "v": [[True, 1]]},
        {"$": "bytes", "v": "?"},
        {"$": "str", "v": "?"},
    ],
)
def test_a_damaged_structure_is_refused(damaged: object) -> None:
    with pytest.raises(InvalidStructureError):
        rebuild(damaged, {})  # type: ignore[arg-type]


def test_tensors_without_values_or_of_a_kind_that_would_not_come_back_are_refused() -> None:
    with pytest.raises(UnsayableStateError, match="'model/w' is on the meta device"):
        flatten({"w": torch.ones(3, device="meta")}, "model")
    with pytest.raises(UnsayableStateError, match=r"'model/w' is of torch.complex128"):
        flatten({"w": torch.ones(3, dtype=torch.complex128)}, "model")
