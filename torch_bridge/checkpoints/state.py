"""A training state without pickle: nested state as named tensors and JSON, and the state of random generators.

A state dict holds dicts, OrderedDicts and Counters (keys: strings and integers), lists, tuples, numbers, strings,
bytes, None and tensors, and each comes back as the type that it was. All but the tensors goes into the structure: a
JSON value in which a value that JSON does not have is `{"$": kind, ...}`. A tensor is its name there, which is its
path: `model/conv1.weight`, `optimizer/state/0/exp_avg`.
"""

from __future__ import annotations

import base64
import math
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torch_bridge.checkpoints.parts import DTYPES

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

_TAG = "$"
_MAX_DEPTH = 64
_MAX_INTEGER_BITS = 14_000
"""Python reads no decimal number of more than 4,300 digits."""
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter"}
_TYPES = {name: kind for kind, name in _MAPPINGS.items()}
_METADATA = "_metadata"
"""What `Module.state_dict` sets on its OrderedDict: the version of each layer's state."""


class UnsayableStateError(TypeError):
    """Raised when a state holds a value that only pickle could keep; the message names its path."""


class InvalidStructureError(ValueError):
    """Raised when a structure that was read is not one that `flatten` writes."""


@dataclass(frozen=True, slots=True)
class FlatState:
    """A state, taken apart."""

    tensors: dict[str, torch.Tensor]
    """By path; the tensors themselves, not copies."""

    structure: Json
    """Everything else, and where each tensor belongs."""


def flatten(state: object, name: str = "") -> FlatState:
    """Take `state` apart. `name` begins each path.

    Raises:
        UnsayableStateError: a value in it is not a tensor, container, number, string, bytes or None.
    """
    tensors: dict[str, torch.Tensor] = {}
    return FlatState(tensors=tensors, structure=_encoded(state, name, tensors, 0))


def rebuild(structure: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state again, with the tensors of `tensors` where they belong.

    Raises:
        InvalidStructureError: the structure is damaged, or names a tensor that `tensors` does not have.
    """
    return _decoded(structure, tensors, 0)


def _encoded(value: object, path: str, tensors: dict[str, torch.Tensor], depth: int) -> Json:
    if depth > _MAX_DEPTH:
        raise UnsayableStateError(
            f"{path!r} is nested deeper than {_MAX_DEPTH} levels (does it contain itself?); flatten it"
        )
    if isinstance(value, torch.Tensor):
        return _encoded_tensor(value, path, tensors)
    # Exact types: a subclass (an enum, numpy's float64) would come back as another type.
    kind = type(value)
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:
        raise UnsayableStateError(f"{path!r} is an integer of {value.bit_length()} bits: keep it as bytes")
    if value is None or kind in (bool, int):
        return value  # type: ignore[return-value]
    if kind is str:
        return _encoded_text(str(value))
    if kind is float:
        number: float = value  # type: ignore[assignment]
        return number if math.isfinite(number) else {_TAG: "float", "v": repr(number)}
    if kind is bytes:
        return {_TAG: "bytes", "v": base64.b64encode(value).decode("ascii")}  # type: ignore[arg-type]
    if isinstance(value, list | tuple) and kind in (list, tuple):
        items = [_encoded(item, _join(path, index), tensors, depth + 1) for index, item in enumerate(value)]
        return items if kind is list else {_TAG: "tuple", "v": list(items)}
    if isinstance(value, Mapping):
        return _encoded_mapping(value, path, tensors, depth)
    raise UnsayableStateError(
        f"{path!r} is a {kind.__module__}.{kind.__qualname__}, which only pickle could keep; a checkpoint holds"
        " tensors, dicts, lists, tuples, numbers, strings, bytes and None: turn it into those"
    )


def _encoded_tensor(value: torch.Tensor, path: str, tensors: dict[str, torch.Tensor]) -> Json:
    kind = type(value)
    if kind.__module__.startswith("torch.distributed."):  # DTensor, ShardedTensor: their import takes seconds
        raise UnsayableStateError(
            f"{path!r} is a {kind.__qualname__}, of which this process holds a part: save sharded states by "
            "torch.distributed.checkpoint with O3StorageWriter, or gather them first (full_tensor(); get_state_dict "
            "with StateDictOptions(full_state_dict=True))"
        )
    if is_traceable_wrapper_subclass(value):
        raise UnsayableStateError(
            f"{path!r} is a {kind.__module__}.{kind.__qualname__}, made of other tensors: save those"
        )
    if value.layout != torch.strided or value.is_quantized:
        raise UnsayableStateError(
            f"{path!r} is a sparse or quantised tensor, which safetensors cannot hold; make it dense"
        )
    if value.is_meta:
        raise UnsayableStateError(f"{path!r} is on the meta device and has no values: materialise it before a save")
    if value.dtype not in DTYPES:
        raise UnsayableStateError(f"{path!r} is of {value.dtype}, which safetensors does not give back: convert it")
    if path in tensors:
        raise UnsayableStateError(f"two tensors have the path {path!r}: a key contains '/'; rename it")
    tensors[path] = value
    return {_TAG: "tensor", "v": path}


def _encoded_text(value: str) -> Json:
    """Names of files, for one, may hold bytes that are not UTF-8: Python keeps them as surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return {_TAG: "str", "v": base64.b64encode(value.encode("utf-8", "surrogatepass")).decode("ascii")}
    return value


def _encoded_mapping(value: Mapping[Any, Any], path: str, tensors: dict[str, torch.Tensor], depth: int) -> Json:
    kind = _MAPPINGS.get(type(value))
    if kind is None:
        raise UnsayableStateError(
            f"{path!r} is a {type(value).__module__}.{type(value).__qualname__}, which would come back as a dict; a"
            " checkpoint holds dict, OrderedDict and Counter: turn it into one (`dict(...)`)"
        )
    for key in value:
        if type(key) not in (str, int):
            raise UnsayableStateError(f"{path!r} has the key {key!r}; a checkpoint's keys are strings and integers")
    keys = [key if type(key) is int else _encoded_text(key) for key in value]
    items = [_encoded(item, _join(path, key), tensors, depth + 1) for key, item in value.items()]
    plain = {key: item for key, item in zip(keys, items, strict=True) if isinstance(key, str)}
    if kind == "dict" and len(plain) == len(items) and _TAG not in plain:
        return plain
    encoded: dict[str, Json] = {_TAG: kind, "v": [[key, item] for key, item in zip(keys, items, strict=True)]}
    if metadata := getattr(value, _METADATA, None):
        encoded["metadata"] = _encoded(metadata, _join(path, _METADATA), tensors, depth + 1)
    return encoded


def _join(path: str, key: str | int) -> str:
    said = str(key).encode("utf-8", "backslashreplace").decode()
    return f"{path}/{said}" if path else said


def _decoded(encoded: Json, tensors: Mapping[str, torch.Tensor], depth: int) -> Any:
    if depth > 2 * _MAX_DEPTH:
        raise InvalidStructureError(
            f"the checkpoint's structure is nested deeper than {2 * _MAX_DEPTH} levels; it is damaged"
        )
    match encoded:
        case {"$": "tensor", "v": str(name)}:
            if name not in tensors:
                raise InvalidStructureError(
                    f"the checkpoint's structure names the tensor {name!r}, which no part holds"
                )
            return tensors[name]
        case {"$": "float", "v": "inf" | "-inf" | "nan" as text}:
            return float(text)
        case {"$": "bytes", "v": str(text)}:
            try:
                return base64.b64decode(text, validate=True)
            except ValueError as error:
                raise InvalidStructureError(f"bytes in the checkpoint's structure are not base64: {error}") from error
        case {"$": "tuple", "v": list(items)}:
            return tuple(_decoded(item, tensors, depth + 1) for item in items)
        case {"$": "str", "v": str(text)}:
            try:
                return base64.b64decode(text, validate=True).decode("utf-8", "surrogatepass")
            except ValueError as error:
                raise InvalidStructureError(f"a string in the checkpoint's structure is damaged: {error}") from error
        case {"$": str(kind), "v": list(pairs)} if kind in _TYPES and isinstance(encoded, dict):
            found = _TYPES[kind](dict(_decoded_pair(pair, tensors, depth) for pair in pairs))
            if "metadata" in encoded:
                setattr(found, _METADATA, _decoded(encoded["metadata"], tensors, depth + 1))
            return found
        case {"$": kind}:
            raise InvalidStructureError(f"the checkpoint's structure has a value of the unknown kind {kind!r}")
        case dict():
            return {key: _decoded(item, tensors, depth + 1) for key, item in encoded.items()}
        case list():
            return [_decoded(item, tensors, depth + 1) for item in encoded]
    return encoded


def _decoded_pair(pair: Json, tensors: Mapping[str, torch.Tensor], depth: int) -> tuple[str | int, Any]:
    match pair:
        case [str() | int() as key, item] if not isinstance(key, bool):
            return key, _decoded(item, tensors, depth + 1)
        case [{"$": "str"} as key, item]:
            return _decoded(key, tensors, depth + 1), _decoded(item, tensors, depth + 1)
    raise InvalidStructureError(
        f"the checkpoint's structure has a dict with the entry {pair!r:.80}, which is not a key and a value"
    )


def rng_state() -> dict[str, Any]:
    """The state of the random generators, as `flatten` takes it: numbers and bytes, no tensor.

    Python's `random`, numpy's global generator if numpy is loaded, torch's on the CPU and on every CUDA device. The
    state of another `torch.Generator` or `numpy.random.Generator` belongs into `extra`.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": _bytes_of(torch.get_rng_state())}
    if "numpy" in sys.modules:
        import numpy as np

        kind, words, position, has_gauss, gauss = np.random.get_state()
        words_le = np.asarray(words, dtype="<u4").tobytes()
        state["numpy"] = (str(kind), words_le, int(position), int(has_gauss), float(gauss))
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = [_bytes_of(one) for one in torch.cuda.get_rng_state_all()]
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the random generators. CUDA devices that this machine does not have are left out.

    Raises ValueError, TypeError or RuntimeError if a state is not one of its generator.
    """
    if "python" in state:
        random.setstate(state["python"])
    if "torch" in state:
        torch.set_rng_state(_tensor_of(state["torch"]))
    if "numpy" in state:
        import numpy as np

        kind, words, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((kind, np.frombuffer(words, dtype="<u4"), position, has_gauss, gauss))
    if "cuda" in state and torch.cuda.is_available():
        for device, one in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(_tensor_of(one), device)


def _bytes_of(state: torch.Tensor) -> bytes:
    return bytes(state.cpu().numpy().tobytes())


def _tensor_of(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
