"""O3StorageWriter and O3StorageReader in one process: what comes back, what is refused, what is chosen."""

from __future__ import annotations

import enum
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from node.cli.demo.s3_server import S3Server
from protocol.errors import InvalidParamsError
from tests.support.bridge.o3_client import client_of
from torch_bridge import O3Client
from torch_bridge.checkpoints.dcp import O3StorageReader, O3StorageWriter
from torch_bridge.checkpoints.state import UnsayableStateError
from torch_bridge.core.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store").mkdir()
    return O3Client().at(f"file://{tmp_path / 'store'}")


class Colour(enum.Enum):
    RED = 1


def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 20))
    optimizer = torch.optim.AdamW(model.parameters(), lr=seed / 1000)
    model(torch.randn(8, 40)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(seed: int) -> dict[str, Any]:
    model, optimizer = trained(seed)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": {"epoch": seed, "seen": []}}


def save(store: Store, state: dict[str, Any], name: str = "run") -> str:
    writer = O3StorageWriter(store, name)
    dcp.save(state, storage_writer=writer)
    assert writer.version is not None
    return writer.version


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in wanted)
    return torch.equal(found, wanted) if isinstance(wanted, torch.Tensor) else bool(found == wanted)


def test_a_model_and_its_optimizer_come_back_bit_equal(store: Store) -> None:
    save(store, state_of(3))
    state = state_of(4)
    reader = O3StorageReader(store, "run")
    dcp.load(state, storage_reader=reader)
    assert same(state, state_of(3))
    assert reader.versions() == [reader.version]


def test_on_a_real_s3_server(module_s3: S3Server) -> None:
    with client_of(module_s3) as client:
        bucket = client.bucket(module_s3.bucket, "checkpoints")
        save(bucket, state_of(3), "run-7/step-1")
        save(bucket, state_of(5), "run-7/step-2")
        state = state_of(4)
        dcp.load(state, storage_reader=O3StorageReader(bucket, "run-7/step-1"))
        assert same(state, state_of(3))


def test_odd_tensors_and_values_come_back(store: Store) -> None:
    large = "word " * 1000
    state: dict[str, Any] = {
        "half": torch.randn(33, 40).bfloat16(),
        "transposed": torch.randn(40, 33).t(),
        "number": torch.tensor(3),
        "view": torch.randn(100, 100)[10:40, 5],
        "empty": torch.ones(0, 5),
        "flags": torch.rand(2000) > 0.5,
        "complex": torch.randn(100, dtype=torch.complex64),
        "rng": torch.get_rng_state(),
        "values": {"text": large, "tuple": (1, (2.5, None)), "nan": float("inf"), "bytes": b"\0\1", "list": [1, [2]]},
    }
    save(store, state)
    found = {
        name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else dict.fromkeys(value)
        for name, value in state.items()
    }
    dcp.load(found, storage_reader=O3StorageReader(store, "run"))
    assert same(found, state)


ELEMENTS = (4, 4096)
"""In the index itself, and as an object."""
REFUSED = {
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),  # torch's planner does not know their size
    *("bits1x8", "bits2x4", "bits4x2", "bits8", "bits16"),
    *("qint8", "qint32", "quint8", "quint4x2", "quint2x4"),
}


@pytest.mark.parametrize("elements", ELEMENTS)
def test_each_dtype_of_torch_is_kept_or_refused_whatever_its_size(store: Store, elements: int) -> None:
    dtypes = {found for found in vars(torch).values() if isinstance(found, torch.dtype)}
    assert len(dtypes) >= 40
    refused = set()
    for dtype in dtypes:
        raw = torch.arange(elements * dtype.itemsize).remainder(2).to(torch.uint8)
        name = str(dtype).removeprefix("torch.")
        try:
            save(store, {"given": raw.view(dtype)}, name)
        except CheckpointException as failed:
            refused.add(name)
            (error, _), *_ = failed.failures.values()
            assert isinstance(error, UnsayableStateError | TypeError)
            assert not name.startswith("q") or f"'given' is of {dtype}" in str(error)
            continue
        state = {"given": torch.zeros_like(raw).view(dtype)}
        dcp.load(state, storage_reader=O3StorageReader(store, name))
        assert torch.equal(state["given"].view(torch.uint8), raw), name
    assert refused == REFUSED


@pytest.mark.parametrize("elements", ELEMENTS)
def test_a_lazy_conjugate_is_kept_as_its_values(store: Store, elements: int) -> None:
    tensor = torch.complex(torch.ones(elements), torch.arange(float(elements)))
    for dtype in (torch.complex64, torch.complex128):
        save(store, {"given": tensor.to(dtype).conj()}, "conjugate")
        state = {"given": torch.zeros(elements, dtype=dtype)}
        dcp.load(state, storage_reader=O3StorageReader(store, "conjugate"))
        assert torch.equal(state["given"], tensor.to(dtype).conj().resolve_conj())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("elements", ELEMENTS)
def test_a_quantised_tensor_is_refused_by_name(store: Store, elements: int) -> None:
    quantised = torch.quantize_per_tensor(torch.ones(elements), 0.1, 0, torch.qint8)
    with pytest.raises(CheckpointException, match="'given' is a sparse or quantised tensor"):
        save(store, {"given": quantised})


def test_nothing_that_is_kept_is_a_pickle(store: Store) -> None:
    save(store, state_of(3) | {"text": "word " * 1000})
    for item in store.list():
        body = store.get(item.key)
        assert len(body) >= 127
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, RuntimeError, KeyError, IndexError)):
            pickle.loads(body)
        assert b"PK\x03\x04" not in body[:4]


@pytest.mark.parametrize("value", [Colour.RED, {1, 2}, torch.Size([2]), (torch.ones(2),)])
def test_a_value_that_only_pickle_could_keep_is_refused_by_name(store: Store, value: object) -> None:
    with pytest.raises(CheckpointException, match=r"'extra\.odd"):
        save(store, {"model": torch.ones(1000), "extra": {"odd": value}})
    assert store.list("dcp/") == []


def test_unchanged_tensors_are_not_put_again(store: Store, tmp_path: Path) -> None:
    state = {"frozen": torch.randn(20_000), "trained": torch.randn(20_000), "twin": torch.ones(20_000)}
    state["other twin"] = state["twin"].clone()
    save(store, state)
    before = {item.key: item.modified_s for item in store.list("shards/")}
    state["trained"] = state["trained"] + 1
    save(store, state)
    after = {item.key: item.modified_s for item in store.list("shards/")}
    assert len(before) == 3
    assert len(after) == 4
    assert {key: after[key] for key in before} == before


def test_a_damaged_object_is_an_error_that_names_it(store: Store, tmp_path: Path) -> None:
    save(store, {"model": {"weight": torch.randn(1000)}})
    (item,) = store.list("shards/")
    body = bytearray(store.get(item.key))
    body[-1] ^= 1
    for damaged in (bytes(body), bytes(body[:-9])):
        store.put(item.key, damaged)
        with pytest.raises(CheckpointException, match=rf"'model\.weight' should be in {item.key}"):
            dcp.load({"model": {"weight": torch.zeros(1000)}}, storage_reader=O3StorageReader(store, "run"))
    store.delete(item.key)
    with pytest.raises(CheckpointException, match=rf"'model\.weight' should be in {item.key}"):
        dcp.load({"model": {"weight": torch.zeros(1000)}}, storage_reader=O3StorageReader(store, "run"))


class Interrupted(O3StorageWriter):
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_save_and_a_damaged_index_are_not_chosen(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    good = save(store, {"w": torch.full((1000,), 1.0)})
    with pytest.raises((KeyboardInterrupt, CheckpointException)):
        dcp.save({"w": torch.full((1000,), 2.0)}, storage_writer=Interrupted(store, "run"))
    bad = save(store, {"w": torch.full((1000,), 3.0)})
    body = store.get(f"dcp/run/{bad}.json")
    store.put(f"dcp/run/{bad}.json", body[: len(body) // 2])
    store.put("dcp/run/notes.txt", b"not an index")

    state, reader = {"w": torch.zeros(1000)}, O3StorageReader(store, "run")
    dcp.load(state, storage_reader=reader)
    assert reader.versions() == [bad, good]
    assert reader.version == good
    assert state["w"][0] == 1
    assert bad in caplog.text


def test_the_newest_is_chosen_and_an_older_one_by_name(store: Store) -> None:
    versions = [save(store, {"step": step}) for step in range(3)]
    state = {"step": -1}
    dcp.load(state, storage_reader=O3StorageReader(store, "run"))
    assert state["step"] == 2
    dcp.load(state, storage_reader=O3StorageReader(store, "run", version=versions[0]))
    assert state["step"] == 0


def test_a_checkpoint_id_given_to_save_and_load_stands_above(store: Store) -> None:
    dcp.save({"step": 5}, storage_writer=O3StorageWriter(store, "run"), checkpoint_id="run/step-5")
    state = {"step": -1}
    dcp.load(state, storage_reader=O3StorageReader(store, "run"), checkpoint_id="run/step-5")
    assert state["step"] == 5
    with pytest.raises(CheckpointException, match="0 versions under dcp/run/"):
        dcp.load(state, storage_reader=O3StorageReader(store, "run"))


@pytest.mark.parametrize("name", ["", "a//b", "../a", "a b", "a/..", "/a"])
def test_an_id_that_is_no_name_is_refused(store: Store, name: str) -> None:
    with pytest.raises(InvalidParamsError, match="run-7/step-100"):
        O3StorageWriter(store, name)


def test_async_save(store: Store) -> None:
    state = {"w": torch.full((1000,), 5.0), "step": 1}
    dcp.async_save(state, storage_writer=O3StorageWriter(store, "run")).result()  # type: ignore[union-attr]
    found = {"w": torch.zeros(1000), "step": 0}
    dcp.load(found, storage_reader=O3StorageReader(store, "run"))
    assert same(found, state)


def test_many_small_tensors_take_few_objects_and_each_comes_back(tmp_path: Path) -> None:
    state = {f"layer{number:04d}": torch.full((200 + number,), float(number)) for number in range(300)}
    state |= {"scalar": torch.tensor(3.0), "large": torch.arange(400_000)}
    store = O3Client().at(f"file://{tmp_path}")
    dcp.save(dict(state), storage_writer=O3StorageWriter(store, "a"))
    objects = [info for info in store.list() if info.key.startswith("shards/")]
    assert len(objects) == 2, "one for the large tensor, one for all small ones"
    back = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(back, storage_reader=O3StorageReader(store, "a"))
    assert all(torch.equal(back[name], state[name]) for name in state)
    one = {"layer0150": torch.zeros(350)}
    dcp.load(one, storage_reader=O3StorageReader(store, "a"))
    assert torch.equal(one["layer0150"], state["layer0150"])


def test_small_tensors_are_packed_up_to_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_bridge.checkpoints.dcp.writer.PACK_BYTES", 10_000)
    state = {f"layer{number}": torch.randn(1_000) for number in range(7)}
    store = O3Client().at(f"file://{tmp_path}")
    dcp.save(dict(state), storage_writer=O3StorageWriter(store, "a"))
    assert len([info for info in store.list() if info.key.startswith("shards/")]) == 3
    back = {name: torch.zeros(1_000) for name in state}
    dcp.load(back, storage_reader=O3StorageReader(store, "a"))
    assert all(torch.equal(back[name], state[name]) for name in state)
