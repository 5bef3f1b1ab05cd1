"""The index: there and back, and what a stranger could write into it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan

from node.origin.interface import ObjectInfo
from protocol.errors import InvalidParamsError
from torch_bridge import O3Client
from torch_bridge.checkpoints.dcp import O3StorageReader, O3StorageWriter
from torch_bridge.checkpoints.dcp.index import InlineBytes, StoredObject, decode_index, encode_index, versions_in
from torch_bridge.checkpoints.dcp.items import plain_value, tensor_of
from torch_bridge.checkpoints.parts import DamagedPartError, content_id_of
from torch_bridge.checkpoints.state import InvalidStructureError, UnsayableStateError

HALVES = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([2, 3])) for at in (0, 2)]
METADATA = Metadata(
    {
        "model.w": TensorStorageMetadata(
            TensorProperties(torch.bfloat16, requires_grad=True), torch.Size([4, 3]), HALVES
        ),
        "step": BytesStorageMetadata(),
    },
    planner_data={"model.w": ("model", "w"), "step": ("step", 0)},
)
STORED = {
    MetadataIndex("model.w", [0, 0]): StoredObject("a" * 64, 900),
    MetadataIndex("model.w", [2, 0]): InlineBytes(b"x" * 12),
    MetadataIndex("step"): InlineBytes(b"7"),
}


def changed(change: dict[str, Any]) -> bytes:
    said = json.loads(encode_index(METADATA, STORED))
    tensor = said["entries"]["model.w"]
    tensor.update({key: value for key, value in change.items() if key in tensor})
    tensor["chunks"][0].update({key: value for key, value in change.items() if key in tensor["chunks"][0]})
    said.update({key: value for key, value in change.items() if key in said})
    return json.dumps(said).encode()


def test_it_comes_back_as_it_was() -> None:
    body = encode_index(METADATA, STORED)
    found = decode_index(body, content_id_of(body))
    assert found.state_dict_metadata == METADATA.state_dict_metadata
    assert found.planner_data == METADATA.planner_data
    assert found.storage_data == STORED
    small = encode_index(Metadata({}), {})
    assert len(small) == 127
    assert decode_index(small, content_id_of(small)).state_dict_metadata == {}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "shoal-dcp-3"},
        {"entries": []},
        {"dtype": "load"},
        {"dtype": "__class__"},
        {"size": [4, -3]},
        {"size": [5, 3]},
        {"size": [4]},
        {"offsets": [9, 0]},
        {"sizes": [1, 3]},
        {"at": {"type": "pickle", "body": ""}},
        {"at": {"type": "inline", "body": "A" * 4096}},
        {"at": {"type": "object", "content_id": "../../secret", "size": 1}},
        {"at": {"type": "range", "content_id": "0" * 64, "size": 10, "offset": 4, "length": 7}},
        {"planner_data": {"$": "tensor", "v": "x"}},
        {"planner_data": {"$": "call", "v": "os.system"}},
    ],
)
def test_a_malformed_one_is_refused(change: dict[str, Any]) -> None:
    body = changed(change)
    with pytest.raises(InvalidStructureError):
        decode_index(body, content_id_of(body))


def test_one_changed_bit_is_found() -> None:
    body = encode_index(METADATA, STORED)
    for damaged in (body[:-1] + b"!", body[:40], b""):
        with pytest.raises(DamagedPartError, match=content_id_of(body)):
            decode_index(damaged, content_id_of(body))


def test_what_no_rank_wrote_is_not_committed() -> None:
    with pytest.raises(InvalidStructureError, match="no rank wrote it"):
        encode_index(METADATA, {key: value for key, value in STORED.items() if key.fqn != "step"})
    half = TensorStorageMetadata(TensorProperties(torch.bfloat16), torch.Size([4, 3]), HALVES[:1])
    with pytest.raises(InvalidStructureError, match="12 elements, and its chunks 6"):
        encode_index(Metadata({"model.w": half}), STORED)


def test_a_planner_with_data_of_its_own_kind_is_refused() -> None:
    for data in (object(), {"t": torch.ones(2)}):
        with pytest.raises(UnsayableStateError, match="planner"):
            encode_index(Metadata({}, planner_data=data), {})


def test_the_newest_first_and_nothing_but_indices() -> None:
    names = ["0000000000002-" + "a" * 64, "0000000000010-" + "0" * 64]
    keys = [f"dcp/run/{name}.json" for name in names] + ["dcp/run/later/" + names[0] + ".json", "dcp/run/x.json"]
    found = versions_in([ObjectInfo(key, 200) for key in keys], "dcp/run/")
    assert [key.version for key in found] == names[::-1]
    assert versions_in([ObjectInfo(keys[0], 1 << 40)], "dcp/run/") == []


def test_an_object_that_is_another_tensor_or_none_is_refused() -> None:
    for body, inline in ((b"\0" * 700, False), (b"12345", True), (b"", True)):
        with pytest.raises(InvalidStructureError, match=r"'model\.w' is not a tensor"):
            tensor_of("model.w", body, torch.float32, torch.Size([4, 3]), inline=inline)
    for body in (b"\x80\x04N.", b'{"$": "call"}', b"[" * 100_000):
        with pytest.raises(InvalidStructureError, match="'step' is not a value"):
            plain_value("step", body)


def test_ranks_that_chose_differently_stop() -> None:
    reader = O3StorageReader(O3Client().at("file:///nowhere"), "run")
    same = [LoadPlan([], storage_data="1-a"), LoadPlan([], storage_data="1-a")]
    assert reader.prepare_global_plan(same) == same
    with pytest.raises(InvalidParamsError, match="1-a, 2-b"):
        reader.prepare_global_plan([same[0], LoadPlan([], storage_data="2-b")])


def test_a_save_without_collectives_is_refused() -> None:
    writer = O3StorageWriter(O3Client().at("file:///nowhere"), "run")
    with pytest.raises(InvalidParamsError, match="use_collectives"):
        writer.set_up_storage_writer(True, rank=0, use_collectives=False)
