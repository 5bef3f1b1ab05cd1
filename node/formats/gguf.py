"""Reads a GGUF's header as hostile input: every count, length and offset is checked against the file first.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian. The reader of the `gguf`
package is not used: it maps what the header announces and trusts it. What the specification allows and llama.cpp
refuses (arrays in arrays, dimensions beyond four) is refused here, since such a file could be shared but never run.

Memory stays below a small multiple of MAX_HEADER_BYTES whatever the file says: values that are long (vocabularies)
are not kept; their offset in the file is, from which `split` copies them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from node.formats.cursor import Cursor, regular_size
from node.formats.ggml_types import GGML_TYPES
from node.formats.gguf_file import FIXED_FORMATS, GgufFile, GgufValue, Scalar, TensorInfo, ValueType
from protocol.errors import InvalidShardError

__all__ = ["GgufFile", "GgufValue", "TensorInfo", "ValueType", "read_gguf"]

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

MAX_HEADER_BYTES = 256 << 20
"""Metadata and tensor list together; a vocabulary of 262,144 tokens makes about 8 MiB."""
MAX_METADATA = 4096
MAX_TENSORS = 1 << 17
MAX_DIMENSIONS = 4
"""GGML_MAX_DIMS of llama.cpp."""
MAX_NAME_BYTES = 64
"""Of a tensor (specification)."""
MAX_KEY_BYTES = 65535
"""(Specification.)"""
MAX_STRINGS = 1 << 21
"""In all arrays of a file together: passing over them takes a second or two."""
MAX_KEPT_TEXT_BYTES = 1 << 20
MAX_KEPT_ITEMS = 4096
"""Of an array of numbers: per-layer values are kept, vocabularies are not."""
_KEPT_TEXT_BUDGET = 8 << 20
_KEPT_ITEMS_BUDGET = 1 << 18
_MAX_ALIGNMENT = 1 << 16
_MAX_ELEMENTS = 1 << 62


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF. Reads no tensor.

    Raises InvalidShardError for a file that is not a GGUF, is truncated, or whose header contradicts itself or the
    file; OSError from opening or reading.
    """
    size = regular_size(path)
    with path.open("rb") as file:
        return _Header(path, file, size).read()


class _Header:
    """The state of one reading: budgets for what is kept, and the cursor."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.name = path.name
        self.size = size
        self.cursor = Cursor(file, path.name, size, MAX_HEADER_BYTES)
        self.text_budget = _KEPT_TEXT_BUDGET
        self.items_budget = _KEPT_ITEMS_BUDGET
        self.strings_budget = MAX_STRINGS

    def read(self) -> GgufFile:
        cursor = self.cursor
        if cursor.take(4, "the magic number") != MAGIC:
            raise InvalidShardError(f"{self.name} is not a GGUF file: it does not begin with {MAGIC.decode()}")
        version = cursor.u32("the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            reason = "a big-endian GGUF" if swapped else f"GGUF version {version}"
            raise InvalidShardError(f"{self.name} is {reason}; versions 2 and 3, little-endian, are read")
        n_tensors = cursor.u64("the number of tensors")
        n_metadata = cursor.u64("the number of metadata values")
        self._bound("tensors", n_tensors, MAX_TENSORS, least_bytes=32)
        self._bound("metadata values", n_metadata, MAX_METADATA, least_bytes=14)

        metadata: dict[str, GgufValue] = {}
        for _ in range(n_metadata):
            key = self._name("a metadata key", MAX_KEY_BYTES)
            if key in metadata:
                raise InvalidShardError(f"{self.name} gives the metadata key {key[:80]!r} twice")
            metadata[key] = self._value(key[:80], self._type(key[:80]))
        alignment = self._alignment(metadata)
        tensors = self._tensors(n_tensors, alignment)
        data_offset = -(-cursor.position // alignment) * alignment
        self._check_extents(tensors, data_offset)
        return GgufFile(
            path=self.path,
            version=version,
            alignment=alignment,
            metadata=metadata,
            tensors=tuple(tensors),
            data_offset=data_offset,
            size=self.size,
        )

    def _bound(self, what: str, count: int, most: int, least_bytes: int) -> None:
        if count > most or count * least_bytes > self.cursor.left:
            raise InvalidShardError(
                f"{self.name} is truncated or malformed: it announces {count} {what}, "
                f"{self.cursor.left} bytes are left and at most {most} are read"
            )

    def _name(self, what: str, most: int) -> str:
        length = self.cursor.u64(f"the length of {what}")
        if not 0 < length <= most:
            raise InvalidShardError(f"{self.name}: {what} of {length} bytes, allowed are 1 to {most}")
        raw = self.cursor.take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise InvalidShardError(f"{self.name}: {what} is not UTF-8: {raw[:40]!r}") from None

    def _type(self, key: str) -> ValueType:
        number = self.cursor.u32(f"the type of {key!r}")
        try:
            return ValueType(number)
        except ValueError:
            raise InvalidShardError(f"{self.name}: {key!r} has the type {number}, which GGUF does not define") from None

    def _value(self, key: str, kind: ValueType) -> GgufValue:
        cursor = self.cursor
        offset = cursor.position
        if kind is ValueType.ARRAY:
            return self._array(key, offset)
        if kind is ValueType.STRING:
            length = cursor.u64(f"the length of {key!r}")
            if length > MAX_KEPT_TEXT_BYTES or length > self.text_budget:
                cursor.skip(length, repr(key))
                return GgufValue(kind, None, offset, 8 + length)
            self.text_budget -= length
            # llama.cpp takes any bytes; what is not UTF-8 is shown as such here and copied as it is.
            text = cursor.take(length, repr(key)).decode(errors="replace")
            return GgufValue(kind, text, offset, 8 + length)
        (value,) = self._numbers(key, kind, 1)
        return GgufValue(kind, value, offset, cursor.position - offset)

    def _array(self, key: str, offset: int) -> GgufValue:
        cursor = self.cursor
        item_type = self._type(key)
        count = cursor.u64(f"the length of {key!r}")
        value: tuple[Scalar, ...] | None = None
        if item_type is ValueType.ARRAY:
            raise InvalidShardError(f"{self.name}: {key!r} is an array of arrays, which llama.cpp does not read")
        if item_type is ValueType.STRING:
            if count > self.strings_budget:
                raise InvalidShardError(f"{self.name}: {key!r} has {count} strings, at most {MAX_STRINGS} are read")
            cursor.require(8 * count, repr(key))
            self.strings_budget -= count
            cursor.skip_strings(count, repr(key))
        elif count <= min(MAX_KEPT_ITEMS, self.items_budget):
            self.items_budget -= count
            value = self._numbers(key, item_type, count)
        else:
            cursor.skip(count * struct.calcsize(f"<{FIXED_FORMATS[item_type]}"), repr(key))
        return GgufValue(ValueType.ARRAY, value, offset, cursor.position - offset, item_type, count)

    def _numbers(self, key: str, kind: ValueType, count: int) -> tuple[Scalar, ...]:
        layout = f"<{count}{FIXED_FORMATS[kind]}"
        values: tuple[Scalar, ...] = struct.unpack(layout, self.cursor.take(struct.calcsize(layout), repr(key)))
        if kind is not ValueType.BOOL:
            return values
        if not set(values) <= {0, 1}:
            raise InvalidShardError(f"{self.name}: {key!r} is a bool that is neither 0 nor 1")
        return tuple(bool(value) for value in values)

    def _alignment(self, metadata: Mapping[str, GgufValue]) -> int:
        found = metadata.get("general.alignment")
        if found is None:
            return DEFAULT_ALIGNMENT
        value = found.value
        if found.type is not ValueType.UINT32 or not isinstance(value, int) or not 0 < value <= _MAX_ALIGNMENT:
            raise InvalidShardError(f"{self.name}: general.alignment is {value!r}, not a uint32 of 1 to 65536")
        if value & (value - 1):
            raise InvalidShardError(f"{self.name}: general.alignment is {value}, not a power of two")
        return value

    def _tensors(self, count: int, alignment: int) -> list[TensorInfo]:
        tensors: list[TensorInfo] = []
        names: set[str] = set()
        for _ in range(count):
            name = self._name("a tensor's name", MAX_NAME_BYTES)
            if name in names:
                raise InvalidShardError(f"{self.name} lists the tensor {name!r} twice")
            names.add(name)
            tensors.append(self._tensor(name, alignment))
        return tensors

    def _tensor(self, name: str, alignment: int) -> TensorInfo:
        cursor = self.cursor
        n_dimensions = cursor.u32(f"tensor {name!r}")
        if not 1 <= n_dimensions <= MAX_DIMENSIONS:
            raise InvalidShardError(f"{self.name}: tensor {name!r} has {n_dimensions} dimensions, allowed are 1 to 4")
        shape = tuple(cursor.u64(f"tensor {name!r}") for _ in range(n_dimensions))
        number = cursor.u32(f"tensor {name!r}")
        offset = cursor.u64(f"tensor {name!r}")
        kind = GGML_TYPES.get(number)
        if kind is None:
            raise InvalidShardError(f"{self.name}: tensor {name!r} has the element type {number}, which is unknown")
        elements = math.prod(shape)
        if not 0 < elements <= _MAX_ELEMENTS:
            raise InvalidShardError(f"{self.name}: tensor {name!r} has the impossible shape {shape}")
        if shape[0] % kind.block_elements:
            raise InvalidShardError(
                f"{self.name}: rows of tensor {name!r} have {shape[0]} elements, {kind.name} needs a multiple of "
                f"{kind.block_elements}"
            )
        if offset % alignment:
            raise InvalidShardError(f"{self.name}: tensor {name!r} at {offset} is not aligned to {alignment} bytes")
        return TensorInfo(name, shape, number, offset, elements // kind.block_elements * kind.block_bytes)

    def _check_extents(self, tensors: list[TensorInfo], data_offset: int) -> None:
        end, before = 0, ""
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise InvalidShardError(f"{self.name}: the tensors {before!r} and {tensor.name!r} overlap")
            end, before = tensor.offset + tensor.size_bytes, tensor.name
        if data_offset + end > self.size and tensors:
            raise InvalidShardError(
                f"{self.name} is truncated or malformed: tensor {before!r} ends at byte {data_offset + end}, "
                f"the file at {self.size}; get the file again"
            )
