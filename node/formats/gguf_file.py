"""The contents of a GGUF's header, as frozen values.

Source: the GGUF specification (ggml, docs/gguf.md). `node.formats.gguf` reads them out of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from protocol.errors import InvalidShardError

Scalar = int | float | bool | str


class ValueType(IntEnum):
    """The types of metadata values, as GGUF numbers them."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


FIXED_FORMATS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
"""`struct` codes of the types of fixed size."""


@dataclass(frozen=True, slots=True)
class GgufValue:
    """One metadata value."""

    type: ValueType
    value: Scalar | tuple[Scalar, ...] | None
    """None if it is too long to keep, or an array of strings."""
    offset: int
    """Offset in the file of its encoded bytes, after the type."""
    size: int
    """Number of those bytes."""
    item_type: ValueType | None = None
    """Of an array."""
    count: int = 1
    """Items of an array."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file; its bytes lie at `GgufFile.data_offset + offset`."""

    name: str
    shape: tuple[int, ...]
    """As GGUF orders it: elements of a row first."""
    ggml_type: int
    """Key of GGML_TYPES."""
    offset: int
    """Bytes from the start of the data."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A header that was read and fits its file."""

    path: Path
    version: int
    alignment: int
    """Bytes that the data and each tensor are aligned to."""
    metadata: Mapping[str, GgufValue] = field(repr=False)
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    """In the order of the header."""
    data_offset: int
    size: int
    """Of the whole file, in bytes."""

    @property
    def architecture(self) -> str:
        """`general.architecture`. Raises InvalidShardError if it is missing."""
        found = self.text("general.architecture")
        if not found:
            raise InvalidShardError(f"{self.path.name} does not name its architecture (general.architecture)")
        return found

    def text(self, key: str) -> str | None:
        """A string, or None if the key is missing. Raises InvalidShardError for any other type."""
        found = self.metadata.get(key)
        if found is None:
            return None
        if not isinstance(found.value, str):
            raise self._wrong(key, found, "a string of at most 1 MiB")
        return found.value

    def integer(self, key: str) -> int | None:
        """A whole number, or None if the key is missing. Raises InvalidShardError for any other type."""
        found = self.metadata.get(key)
        if found is None:
            return None
        if not isinstance(found.value, int) or isinstance(found.value, bool):
            raise self._wrong(key, found, "a whole number")
        return found.value

    def layer_integers(self, key: str, n_layers: int) -> tuple[int, ...] | None:
        """One number for each layer, from an array of that length or one number for all; None if it is missing."""
        found = self.metadata.get(key)
        if found is None:
            return None
        if found.type is not ValueType.ARRAY:
            one = self.integer(key)
            return (one or 0,) * n_layers
        items = found.value
        if not isinstance(items, tuple) or len(items) < n_layers or not all(isinstance(item, int) for item in items):
            raise self._wrong(key, found, f"an array of {n_layers} whole numbers, one for each layer")
        return tuple(int(item) for item in items[:n_layers])

    def _wrong(self, key: str, found: GgufValue, wanted: str) -> InvalidShardError:
        kind = found.type.name.lower()
        if found.item_type is not None:
            kind = f"array of {found.count} {found.item_type.name.lower()}"
        return InvalidShardError(f"{self.path.name}: {key} must be {wanted}, it is {kind}")
