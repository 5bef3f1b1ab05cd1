"""Writes a GGUF as a stream: the same plan and source give the same bytes on every machine.

The `gguf` package's GGUFWriter does not serve here: it guesses the item types of arrays from Python values (an array
of uint32 comes out as int32), drops empty strings and arrays, and holds vocabularies as Python lists. Here whatever
comes from the source unchanged is copied as encoded bytes, and only what changes is encoded again. It writes GGUF
version 3, whose encoding on little-endian machines is that of version 2.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from node.formats.gguf_file import FIXED_FORMATS, GgufFile, TensorInfo, ValueType
from protocol.errors import InvalidShardError

_VERSION = 3
_CHUNK_BYTES = 1 << 20

OnBytes = Callable[[int], None]
"""Called with the number of bytes written since the last call."""


@dataclass(frozen=True, slots=True)
class SourceRange:
    """Bytes of the source file."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One metadata value to write: encoded here, or copied from the source."""

    key: str
    type: ValueType
    value: bytes | SourceRange

    @property
    def size(self) -> int:
        """Encoded bytes of key, type and value."""
        return (
            8
            + len(self.key.encode())
            + 4
            + (self.value.size if isinstance(self.value, SourceRange) else len(self.value))
        )


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor to write: copied from the source, or zeros."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    size_bytes: int
    source: SourceRange | None
    """None: zeros."""


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """All that a file will hold, and so its size, before a byte is written."""

    entries: tuple[Entry, ...]
    tensors: tuple[PlannedTensor, ...]
    alignment: int

    @property
    def header_bytes(self) -> int:
        """Bytes before the padding that the data follows."""
        infos = sum(8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 12 for tensor in self.tensors)
        return 24 + sum(entry.size for entry in self.entries) + infos

    @property
    def size(self) -> int:
        """Bytes of the file. Every tensor is padded, the last one too, as llama.cpp's writer does."""
        data = sum(_padded(tensor.size_bytes, self.alignment) for tensor in self.tensors)
        return _padded(self.header_bytes, self.alignment) + data


def taken_over(gguf: GgufFile, key: str) -> Entry:
    """A metadata value of the source, unchanged."""
    value = gguf.metadata[key]
    return Entry(key, value.type, SourceRange(value.offset, value.size))


def taken_tensor(gguf: GgufFile, tensor: TensorInfo, name: str) -> PlannedTensor:
    """A tensor of the source, unchanged, under another name."""
    span = SourceRange(gguf.data_offset + tensor.offset, tensor.size_bytes)
    return PlannedTensor(name, tensor.shape, tensor.ggml_type, tensor.size_bytes, span)


def number(key: str, kind: ValueType, value: float) -> Entry:
    """A metadata value of a fixed-size type."""
    return Entry(key, kind, struct.pack(f"<{FIXED_FORMATS[kind]}", value))


def text(key: str, value: str) -> Entry:
    """A string as metadata."""
    raw = value.encode()
    return Entry(key, ValueType.STRING, struct.pack("<Q", len(raw)) + raw)


def numbers(key: str, item_type: ValueType, values: Sequence[float]) -> Entry:
    """An array of a fixed-size type as metadata."""
    head = struct.pack("<IQ", item_type, len(values))
    return Entry(key, ValueType.ARRAY, head + struct.pack(f"<{len(values)}{FIXED_FORMATS[item_type]}", *values))


def write_gguf(plan: GgufPlan, source: BinaryIO, out: BinaryIO, progress: OnBytes | None = None) -> None:
    """Write `plan`, copying from `source`; 1 MiB in memory at a time beside the tensor list.

    Raises InvalidShardError if the source ends early (it was changed meanwhile), OSError from reading or writing.
    """
    report = progress or (lambda _: None)
    out.write(b"GGUF" + struct.pack("<IQQ", _VERSION, len(plan.tensors), len(plan.entries)))
    for entry in plan.entries:
        key = entry.key.encode()
        out.write(struct.pack("<Q", len(key)) + key + struct.pack("<I", entry.type))
        if isinstance(entry.value, SourceRange):
            _copy(source, out, entry.value, lambda _: None)
        else:
            out.write(entry.value)
    offset = 0
    for tensor in plan.tensors:
        name = tensor.name.encode()
        dimensions = len(tensor.shape)
        out.write(struct.pack("<Q", len(name)) + name)
        out.write(struct.pack(f"<I{dimensions}QIQ", dimensions, *tensor.shape, tensor.ggml_type, offset))
        offset += _padded(tensor.size_bytes, plan.alignment)
    header = plan.header_bytes
    out.write(bytes(_padded(header, plan.alignment) - header))
    report(_padded(header, plan.alignment))
    for tensor in plan.tensors:
        if tensor.source is None:
            _zeros(out, tensor.size_bytes, report)
        else:
            _copy(source, out, tensor.source, report)
        padding = _padded(tensor.size_bytes, plan.alignment) - tensor.size_bytes
        out.write(bytes(padding))
        report(padding)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _zeros(out: BinaryIO, size: int, report: OnBytes) -> None:
    while size:
        step = min(size, _CHUNK_BYTES)
        out.write(bytes(step))
        report(step)
        size -= step


def _copy(source: BinaryIO, out: BinaryIO, span: SourceRange, report: OnBytes) -> None:
    source.seek(span.offset)
    left = span.size
    while left:
        piece = source.read(min(left, _CHUNK_BYTES))
        if not piece:
            raise InvalidShardError("the file became shorter while it was cut: try again when it is complete")
        out.write(piece)
        report(len(piece))
        left -= len(piece)
