"""One item of a distributed checkpoint <-> bytes: a tensor, or a plain value. No pickle in what is kept."""

from __future__ import annotations

import io
import pickle
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType

from torch_bridge.checkpoints.dcp.index import INLINE_BYTES, dtype_name
from torch_bridge.checkpoints.parts import DTYPES, bytes_of, pack
from torch_bridge.checkpoints.state import InvalidStructureError, UnsayableStateError, flatten, rebuild

_NAME = "tensor"
"""The same for every tensor: equal tensors are one object, whatever they are called."""
_AS_BYTES = frozenset({torch.complex32, torch.complex128, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2})
"""Kept as uint8, since safetensors' reader for torch does not know them; the index says what they are."""


def body_of(item: WriteItem, planner: SavePlanner) -> bytes:
    """The bytes that are kept of an item. Raises UnsayableStateError, which names it."""
    found = planner.resolve_data(item)
    if item.type == WriteItemType.BYTE_IO:
        return _encoded_value(item.index.fqn, found)
    if not isinstance(found, torch.Tensor):
        raise UnsayableStateError(f"{item.index.fqn!r}: the planner gave a {type(found).__qualname__} for a tensor")
    return _encoded_tensor(item.index.fqn, found)


def _encoded_value(fqn: str, found: object) -> bytes:
    """torch's planners give values as torch.save writes them. These bytes come from this process's memory and are read
    with weights_only; the value is written as JSON.
    """
    try:
        assert isinstance(found, io.BytesIO)
        found.seek(0)
        value = torch.load(found, map_location="cpu", weights_only=True)
    except (AssertionError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        said = " ".join(str(error).split())[:300]
        raise UnsayableStateError(
            f"{fqn!r} is a value that only pickle could keep; a checkpoint holds tensors, dicts, lists, tuples,"
            f" numbers, strings, bytes and None: turn it into those ({said})"
        ) from None
    flat = flatten(value, fqn)
    if flat.tensors:
        raise UnsayableStateError(
            f"{fqn!r} is a value with tensors inside ({', '.join(flat.tensors)}), which the planner did not take apart:"
            " leave flatten_state_dict on, and put tensors into dicts or lists"
        )
    return msgspec.json.encode(flat.structure)


def plain_value(fqn: str, body: bytes) -> io.BytesIO:
    """The value of `body` in the form that torch's planners want: JSON is read, and pickled here in memory."""
    try:
        value: Any = rebuild(msgspec.json.decode(body), {})
    except (msgspec.DecodeError, RecursionError, InvalidStructureError) as error:
        raise InvalidStructureError(f"{fqn!r} is not a value that a checkpoint holds: {error}") from None
    made = io.BytesIO()
    torch.save(value, made)
    made.seek(0)
    return made


def _encoded_tensor(fqn: str, tensor: torch.Tensor) -> bytes:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise UnsayableStateError(
            f"{fqn!r} is a sparse or quantised tensor, which safetensors cannot hold; make it dense"
        )
    if tensor.dtype not in DTYPES and tensor.dtype not in _AS_BYTES:
        raise UnsayableStateError(f"{fqn!r} is of {tensor.dtype}, which a checkpoint does not hold: convert it")
    here = tensor.detach().cpu()
    if here.numel() * here.element_size() <= INLINE_BYTES:
        return bytes(bytes_of(here).numpy().tobytes())
    (part,) = pack({_NAME: here if here.dtype in DTYPES else bytes_of(here)})
    return part.body


def tensor_of(fqn: str, body: bytes, dtype: torch.dtype, sizes: torch.Size, *, inline: bool) -> torch.Tensor:
    """The tensor of a chunk, whose bytes were compared with what the index names.

    Raises:
        InvalidStructureError: they are not a tensor of this dtype and these sizes.
    """
    try:
        if inline:
            return torch.tensor(list(body), dtype=torch.uint8).view(dtype).reshape(sizes)
        tensor = load(body)[_NAME]
        if dtype in _AS_BYTES and tensor.dtype == torch.uint8:
            tensor = tensor.view(dtype).reshape(sizes)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InvalidStructureError(f"{fqn!r} is not a tensor: {error}") from None
    if tensor.dtype != dtype or tensor.shape != sizes:
        raise InvalidStructureError(
            f"{fqn!r} should be {dtype_name(dtype)} {tuple(sizes)}, and the object that the index names is "
            f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
        )
    return tensor
