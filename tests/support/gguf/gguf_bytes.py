"""Builds GGUF headers byte by byte, also wrong ones, from the specification alone."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: bytes | str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def string_entry(key: str, value: str) -> bytes:
    return entry(key, STRING, text(value))


def u32_entry(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


def array_entry(key: str, kind: int, count: int, items: bytes) -> bytes:
    return entry(key, ARRAY, struct.pack("<IQ", kind, count) + items)


@dataclass
class Tensor:
    name: bytes | str = "t"
    shape: Sequence[int] = (32,)
    kind: int = 0
    offset: int = 0
    dimensions: int | None = None

    def encode(self) -> bytes:
        count = len(self.shape) if self.dimensions is None else self.dimensions
        return (
            text(self.name)
            + struct.pack(f"<I{len(self.shape)}Q", count, *self.shape)
            + struct.pack("<IQ", self.kind, self.offset)
        )


def gguf(
    metadata: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    *,
    data: int = 0,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_metadata: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of these parts and `data` zero bytes; the counts as given, whatever is there."""
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(metadata) if n_metadata is None else n_metadata,
    )
    head += b"".join(metadata) + b"".join(tensor.encode() for tensor in tensors)
    return head + bytes(-len(head) % alignment) + bytes(data)
