"""Named tensors -> safetensors files of bounded size, each known by its content id.

The grouping follows from names and sizes alone, so a part whose tensors did not change has the same bytes as in the
checkpoint before, and is at the origin already. A part holds whole tensors. The format is written here
(github.com/huggingface/safetensors, "Format"), since safetensors' own writer copies everything twice and cannot give
the bytes piece by piece; what is read goes through safetensors' reader, which checks it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import msgspec
import torch
from safetensors.torch import load

from protocol.content import ContentHasher
from protocol.ids import ContentId

PART_BYTES = 64 * 1024 * 1024
"""A part ends before it would exceed this; a tensor that is larger has a part of its own."""
_HASHED_AT_ONCE = 1 << 20
"""Small enough for a processor's cache: the hasher copies data that does not begin at a leaf."""
DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
"""The dtypes that can be kept, those that safetensors' reader for torch knows, with its names."""


class DamagedPartError(ValueError):
    """Raised when a part's bytes are not those that its content id names."""


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint."""

    names: tuple[str, ...]
    """The tensors in it, in order of names."""
    pieces: tuple[bytes | memoryview, ...]
    """safetensors, one piece after the other: the header, then the memory of each tensor, which is not copied."""

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return sum(len(piece) for piece in self.pieces)

    @cached_property
    def content_id(self) -> ContentId:
        """Hashed when it is asked for, once."""
        hasher = ContentHasher(self.size)
        for piece in self.pieces:
            for start in range(0, len(piece), _HASHED_AT_ONCE):
                hasher.update(bytes(piece[start : start + _HASHED_AT_ONCE]))
        return hasher.result().content_id

    @property
    def body(self) -> bytes:
        """All of it, copied."""
        return b"".join(self.pieces)


def group(sizes: Mapping[str, int], bound_bytes: int = PART_BYTES) -> Iterator[tuple[str, ...]]:
    """Names of the tensors of each part, in the order of names. `sizes`: bytes of each tensor."""
    names: list[str] = []
    total = 0
    for name in sorted(sizes):
        if names and total + sizes[name] > bound_bytes:
            yield tuple(names)
            names, total = [], 0
        names.append(name)
        total += sizes[name]
    if names:
        yield tuple(names)


def pack(tensors: Mapping[str, torch.Tensor], bound_bytes: int = PART_BYTES) -> Iterator[Part]:
    """The parts of `tensors`, which are on the CPU and do not change while a part of them is used.

    Those that are not contiguous are copied. Raises ValueError for a dtype that is not in DTYPES.
    """
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    for names in group(sizes, bound_bytes):
        yield laid_out({name: tensors[name] for name in names})


def laid_out(tensors: Mapping[str, torch.Tensor]) -> Part:
    """One part of all `tensors`, see `pack`. The widest elements come first, so that each tensor is aligned."""
    names = tuple(sorted(tensors))
    header: dict[str, object] = {}
    pieces: list[bytes | memoryview] = []
    at = 0
    for name in sorted(names, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name!r} is of {tensor.dtype}, which safetensors does not give back to torch")
        memory = memoryview(bytes_of(tensor).numpy().data)
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(memory)],
        }
        pieces.append(memory)
        at += len(memory)
    encoded = msgspec.json.encode(header)
    encoded = encoded.ljust(-(-len(encoded) // 8) * 8)
    return Part(names, (len(encoded).to_bytes(8, "little") + encoded, *pieces))


def unpack(body: bytes, content_id: ContentId) -> dict[str, torch.Tensor]:
    """The tensors of a part, checked against its content id before they are parsed.

    Raises:
        DamagedPartError: the bytes are others.
    """
    found = content_id_of(body) if body else "nothing"
    if found != content_id:
        raise DamagedPartError(
            f"a part of the checkpoint should be {content_id} and is {found} ({len(body)} bytes): take it from another"
            " source or an older checkpoint"
        )
    return load(body)


def content_id_of(body: bytes) -> ContentId:
    """The content id of `body`, which is not empty."""
    hasher = ContentHasher(len(body))
    hasher.update(body)
    return hasher.result().content_id


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Its memory, one-dimensional; a lazy negation or conjugation is carried out."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


T = TypeVar("T")
K = TypeVar("K")
IN_FLIGHT = 4
"""Items in memory and on their way at a time, of each rank."""


def in_order(pool: ThreadPoolExecutor, work: Callable[[K], T], items: Iterable[K], ahead: int) -> Iterator[tuple[K, T]]:
    """Each item with its result of `work`, in order; at most `ahead` of them are begun and not taken."""
    waiting: deque[tuple[K, Future[T]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) >= ahead:
                first, result = waiting.popleft()
                yield first, result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, result.result()
    finally:
        for _, result in waiting:
            result.cancel()
