"""Parts: bounded, the same for the same tensors, and never read when their bytes are others."""

import pytest
import torch

from torch_bridge.checkpoints.parts import DamagedPartError, group, pack, unpack


def test_a_part_ends_before_the_bound_and_a_large_tensor_stands_alone() -> None:
    assert list(group({"c": 4, "a": 6, "b": 5, "d": 30, "e": 1}, 10)) == [("a",), ("b", "c"), ("d",), ("e",)]


def test_only_the_part_of_a_changed_tensor_changes() -> None:
    tensors = {name: torch.full((100,), index, dtype=torch.float32) for index, name in enumerate("abcd")}
    before = [part.content_id for part in pack(tensors, 800)]
    after = [part.content_id for part in pack(tensors | {"d": torch.zeros(100)}, 800)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_every_tensor_comes_back_bit_equal() -> None:
    weight = torch.randn(8, 6)
    tensors = {
        "w": weight,
        "tied": weight,
        "t": weight.t(),
        "half": weight.bfloat16(),
        "empty": torch.ones(0),
        "n": torch.tensor(3),
    }
    back: dict[str, torch.Tensor] = {}
    for part in pack(tensors, 256):
        back |= unpack(part.body, part.content_id)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_one_changed_bit_is_found() -> None:
    (part,) = pack({"w": torch.ones(9)})
    for damaged in (part.body[:-1] + b"\x01", part.body[:-1], b""):
        with pytest.raises(DamagedPartError, match=part.content_id):
            unpack(damaged, part.content_id)
