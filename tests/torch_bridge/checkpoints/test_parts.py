"""Parts: bounded, the same for the same tensors, and never read when their bytes are others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from torch_bridge.checkpoints.parts import DTYPES, DamagedPartError, content_id_of, group, laid_out, pack, unpack
from torch_bridge.checkpoints.upload import take_snapshot


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


def test_a_part_is_what_safetensors_writes_and_reads(tmp_path: Path) -> None:
    tensors = {f'a/{number} \u00e4"': torch.ones(7, 3).to(dtype) for number, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(5, dtype=torch.int16), "none": torch.ones(0, 4)}
    part = laid_out(tensors)
    assert part.content_id == content_id_of(part.body)
    assert part.size == len(part.body)
    path = tmp_path / "part"
    path.write_bytes(part.body)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert file.get_tensor(name).dtype == tensor.dtype
            assert torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (file.get_tensor(name), tensor)))
    header_bytes = int.from_bytes(part.body[:8], "little")
    header = json.loads(part.body[8 : 8 + header_bytes])
    assert (8 + header_bytes) % 8 == 0
    assert all(one["data_offsets"][0] % tensors[name].element_size() == 0 for name, one in header.items())
    plain = {name: torch.randn(50, 3) for name in "cab"}
    assert laid_out(plain).body == save(plain)
    with pytest.raises(ValueError, match=r"'w' is of torch.complex128"):
        laid_out({"w": torch.ones(2, dtype=torch.complex128)})


def test_a_snapshot_shares_no_memory_and_lies_as_it_is_sent() -> None:
    image = torch.randn(2, 3, 4, 5)
    complex_ = torch.randn(4, dtype=torch.complex64)
    state = {
        "last": image.to(memory_format=torch.channels_last),
        "turned": image.transpose(0, 3),
        "wide": torch.ones(1).expand(9),
        "conj": complex_.conj(),
        "neg": complex_.conj().imag,
        "slice": image[:, 1],
        "tied": image,
        "again": image,
        "wanted": torch.nn.Parameter(torch.ones(3)),
    }
    expected = {name: tensor.detach().clone() for name, tensor in state.items()}
    lazy = laid_out({"conj": state["conj"], "neg": state["neg"]})
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unpack(lazy.body, lazy.content_id).items())
    snapshot = take_snapshot("run", 0, None, state)
    part = laid_out(snapshot.state.tensors)
    for tensor in (image, complex_):
        tensor.zero_()
    with torch.no_grad():
        state["wanted"].zero_()
    back = unpack(part.body, part.content_id)
    for name, tensor in expected.items():
        assert torch.equal(back[name], tensor.resolve_conj()), name
        assert snapshot.state.tensors[name].is_contiguous()
        assert not snapshot.state.tensors[name].requires_grad


def test_a_snapshot_is_made_in_the_memory_of_one_before() -> None:
    before = take_snapshot("run", 0, None, {"same": torch.ones(4), "grown": torch.ones(2), "gone": torch.ones(1)})
    spare = before.state.tensors
    places = {name: tensor.data_ptr() for name, tensor in spare.items()}
    state = {"same": torch.full((2, 2), 3.0).t().reshape(4), "grown": torch.ones(5), "new": torch.zeros(3)}
    after = take_snapshot("run", 1, None, state, spare).state.tensors
    assert {name: tensor.tolist() for name, tensor in after.items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }
    assert after["same"].data_ptr() == places["same"]
    assert after["grown"].data_ptr() != places["grown"]
    assert not after["same"].requires_grad
