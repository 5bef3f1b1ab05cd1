"""What a slice of a model must hold for llama.cpp to load it and compute the same as in the whole model.

Every slice: its blocks, renumbered from 0; the metadata, with per-layer values cut to its layers; tensors that
belong to no block but are read in every one (rope factors); output_norm, which the loader demands though only the
last slice uses it. Beyond that
- the first slice: the tokenizer and `token_embd`;
- a middle slice: the tokenizer `no_vocab` and an embedding of 32 rows of zeros, since the loader wants one;
- the last slice: the tokenizer and the output matrix. If a model has both `output` and `token_embd`, the output
  matrix is stored under the name `token_embd`, which the loader takes for both when there is no `output`: hidden
  states enter a last slice, so its embedding is never looked up, and a copy of it would be useless.
A model in one shard keeps all that it has.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from node.formats.architectures import ArchitectureRule
from node.formats.ggml_types import F32
from node.formats.gguf_file import GgufFile, TensorInfo, ValueType
from node.formats.gguf_writer import Entry, GgufPlan, PlannedTensor, number, numbers, taken_over, taken_tensor, text
from protocol.errors import IllegalCutError, InvalidShardError

START_LAYER = "shoal.shard.start_layer"
END_LAYER = "shoal.shard.end_layer"
SHARD_INDEX = "shoal.shard.index"
SHARD_COUNT = "shoal.shard.count"
N_LAYERS = "shoal.model.n_layers"

DUMMY_ROWS = 32
"""Rows of a middle slice's embedding: one quantisation block, far fewer than any vocabulary."""

_EVERYWHERE = ("rope_freqs.", "rope_factors_long.", "rope_factors_short.", "output_norm.")
_BLOCK = re.compile(r"^blk\.(0|[1-9]\d{0,5})\.(.+)\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SliceInfo:
    """A slice's position in the model, by its own metadata."""

    start_layer: int
    end_layer: int
    n_layers: int
    index: int
    count: int


def slice_info(gguf: GgufFile) -> SliceInfo | None:
    """The position of a slice in its model, or None for a GGUF that `split` did not write.

    Raises InvalidShardError if the keys are incomplete or contradict each other.
    """
    keys = (START_LAYER, END_LAYER, N_LAYERS, SHARD_INDEX, SHARD_COUNT)
    values = [gguf.integer(key) for key in keys]
    present = [value for value in values if value is not None]
    if not present:
        return None
    if len(present) < len(keys):
        missing = [key for key, value in zip(keys, values, strict=True) if value is None]
        raise InvalidShardError(f"{gguf.path.name} is a slice of a model but lacks {', '.join(missing)}")
    info = SliceInfo(*present)
    if not (0 <= info.start_layer < info.end_layer <= info.n_layers and 0 <= info.index < info.count):
        raise InvalidShardError(f"{gguf.path.name} contradicts itself: {info}")
    return info


def block_of(tensor: TensorInfo) -> tuple[int, str] | None:
    """(layer, rest of the name) of a block's tensor, None for any other."""
    found = _BLOCK.match(tensor.name)
    return (int(found[1]), found[2]) if found else None


def plan_slice(gguf: GgufFile, rule: ArchitectureRule, n_layers: int, cuts: tuple[int, ...], index: int) -> GgufPlan:
    """Plan slice `index` of a model of `n_layers` layers cut at `cuts` (boundaries, 0 and n_layers among them)."""
    start, end = cuts[index], cuts[index + 1]
    count = len(cuts) - 1
    place = (
        number(START_LAYER, ValueType.UINT32, start),
        number(END_LAYER, ValueType.UINT32, end),
        number(SHARD_INDEX, ValueType.UINT32, index),
        number(SHARD_COUNT, ValueType.UINT32, count),
        number(N_LAYERS, ValueType.UINT32, n_layers),
    )
    if count == 1:
        entries = tuple(taken_over(gguf, key) for key in gguf.metadata if not key.startswith("shoal."))
        tensors = tuple(taken_tensor(gguf, tensor, tensor.name) for tensor in gguf.tensors)
    else:
        entries = tuple(_metadata(gguf, rule, n_layers, start, end))
        tensors = tuple(_tensors(gguf, rule, n_layers, start, end))
    return GgufPlan(entries + place, tensors, gguf.alignment)


def _metadata(gguf: GgufFile, rule: ArchitectureRule, n_layers: int, start: int, end: int) -> list[Entry]:
    arch = gguf.architecture
    middle = start > 0 and end < n_layers
    all_layers = gguf.integer(f"{arch}.block_count") or 0
    replaced: dict[str, Entry] = {}

    def replace(name: str, value: int) -> None:
        key = f"{arch}.{name}"
        if gguf.integer(key) is not None:
            replaced[key] = number(key, ValueType.UINT32, value)

    replace("block_count", end - start)
    replace("nextn_predict_layers", 0)
    dense = gguf.integer(f"{arch}.leading_dense_block_count") or 0
    replace("leading_dense_block_count", min(max(dense - start, 0), end - start))
    scale = f"{arch}.embedding_scale"
    if start > 0 and (rule.scales_embeddings or scale in gguf.metadata):
        replaced[scale] = number(scale, ValueType.FLOAT32, 1.0)  # hidden states come scaled already
    if middle:
        vocabulary = f"{arch}.vocab_size"
        replaced[vocabulary] = number(vocabulary, ValueType.UINT32, DUMMY_ROWS)

    entries: list[Entry] = []
    for key, value in gguf.metadata.items():
        if key.startswith(("shoal.", "split.")) or (middle and key.startswith("tokenizer.")):
            continue
        changed = replaced.pop(key, None)
        if changed is None and _is_per_layer(gguf, arch, key, all_layers):
            if not isinstance(value.value, tuple) or value.item_type is None:
                raise IllegalCutError(f"{key} has a value for each layer that cannot be divided: {value.item_type!r}")
            items = [float(item) if isinstance(item, float) else int(item) for item in value.value[start:end]]
            changed = numbers(key, value.item_type, items)
        entries.append(changed or taken_over(gguf, key))
    entries += replaced.values()
    if middle:
        entries.append(text("tokenizer.ggml.model", "no_vocab"))
    return entries


def _is_per_layer(gguf: GgufFile, arch: str, key: str, all_layers: int) -> bool:
    value = gguf.metadata[key]
    if value.type is not ValueType.ARRAY or value.count != all_layers or key == f"{arch}.rope.dimension_sections":
        return False
    return key.startswith((f"{arch}.", "xielu."))


def _tensors(gguf: GgufFile, rule: ArchitectureRule, n_layers: int, start: int, end: int) -> list[PlannedTensor]:
    first, last = start == 0, end == n_layers
    outputs = {tensor.name for tensor in gguf.tensors if tensor.name.startswith("output.")}
    alias = rule.ties_output and outputs == {"output.weight"}
    planned: list[PlannedTensor] = []
    for tensor in gguf.tensors:
        block = block_of(tensor)
        if block is not None:
            layer, rest = block
            if start <= layer < end:
                planned.append(taken_tensor(gguf, tensor, f"blk.{layer - start}.{rest}"))
        elif tensor.name.startswith(_EVERYWHERE):
            planned.append(taken_tensor(gguf, tensor, tensor.name))
        elif tensor.name == "token_embd.weight":
            if first or (last and not alias):
                planned.append(taken_tensor(gguf, tensor, tensor.name))
            elif not last:
                planned.append(_dummy(tensor))
        elif tensor.name == "output.weight" and alias:
            if last:
                planned.append(taken_tensor(gguf, tensor, "token_embd.weight"))
        elif tensor.name in ("output.weight", "output.bias"):
            planned.append(taken_tensor(gguf, tensor, tensor.name) if first or last else _dummy(tensor))
        else:
            raise IllegalCutError(
                f"{gguf.path.name} cannot be cut: its tensor {tensor.name!r} belongs to no layer, and which slice "
                f"needs it is not known; keep the model in one shard",
                {"legal": []},
            )
    return planned


def _dummy(tensor: TensorInfo) -> PlannedTensor:
    """Zeros in place of a matrix of one row for each token (or of a bias for each token)."""
    shape = (*tensor.shape[:-1], DUMMY_ROWS)
    elements = 1
    for extent in shape:
        elements *= extent
    return PlannedTensor(tensor.name, shape, F32, 4 * elements, None)
