"""A smaller model out of a real one: its vocabulary, its sizes and its weights, but only the first of its layers."""

from __future__ import annotations

from pathlib import Path

from node.formats.gguf import read_gguf
from node.formats.gguf_file import ValueType
from node.formats.gguf_writer import GgufPlan, number, taken_over, taken_tensor, write_gguf
from node.formats.slices import block_of


def write_first_layers(model: Path, to: Path, layers: int) -> None:
    gguf = read_gguf(model)
    count = f"{gguf.architecture}.block_count"
    entries = [
        number(key, ValueType.UINT32, layers) if key == count else taken_over(gguf, key) for key in gguf.metadata
    ]
    kept = [tensor for tensor in gguf.tensors if (block := block_of(tensor)) is None or block[0] < layers]
    tensors = [taken_tensor(gguf, tensor, tensor.name) for tensor in kept]
    with model.open("rb") as source, to.open("wb") as out:
        write_gguf(GgufPlan(tuple(entries), tuple(tensors), gguf.alignment), source, out)
