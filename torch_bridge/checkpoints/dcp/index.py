"""The index of a distributed checkpoint: torch.distributed.checkpoint's `Metadata` as one JSON object, and back.

    dcp/<checkpoint id>/<13 digits>-<content id>.json     by the milliseconds since 1970; never written twice
    shards/<content id>                                   what the index names: one tensor or value, or many small ones

No pickle: the index is typed JSON, checked against the content id in its name before it is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from node.origin.interface import ObjectInfo
from protocol.errors import InvalidParamsError
from protocol.ids import ContentId
from protocol.structs import prepared
from torch_bridge.checkpoints.parts import DamagedPartError, content_id_of
from torch_bridge.checkpoints.state import InvalidStructureError, UnsayableStateError, flatten, rebuild

MIN_OBJECT_BYTES = 127
"""Akave refuses smaller objects."""
MAX_INDEX_BYTES = 256 * 1024 * 1024
INLINE_BYTES = 512
"""Up to this length, bytes are in the index itself: optimisers have a number or two for each tensor."""
_STAMPED = re.compile(r"(\d{13})-([0-9a-f]{64})\.json")
_COMPONENT = re.compile(r"[A-Za-z0-9._-]{1,180}")

_Length = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Lengths = Annotated[tuple[_Length, ...], msgspec.Meta(max_length=64)]


class IndexKey(NamedTuple):
    """The parts of an index's name; sorted by time."""

    written_ms: int
    """Since 1970, by the coordinator's clock, and later than the index before."""
    content_id: ContentId
    key: str

    @property
    def version(self) -> str:
        return f"{self.written_ms:013d}-{self.content_id}"


class InlineBytes(msgspec.Struct, frozen=True, tag="inline"):
    """Bytes in the index itself."""

    body: Annotated[bytes, msgspec.Meta(max_length=INLINE_BYTES)]


class StoredObject(msgspec.Struct, frozen=True, tag="object"):
    """Bytes at `shards/<content id>`."""

    content_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, msgspec.Meta(ge=1, le=2**62)]


class StoredRange(msgspec.Struct, frozen=True, tag="range"):
    """Bytes [offset, offset + length) of an object of `size` bytes at `shards/<content id>`."""

    content_id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    length: Annotated[int, msgspec.Meta(ge=1, le=2**62)]

    def __post_init__(self) -> None:
        if self.offset + self.length > self.size:
            raise ValueError(f"bytes {self.offset} to {self.offset + self.length} of an object of {self.size}")


Stored = InlineBytes | StoredObject | StoredRange


class TensorChunk(msgspec.Struct, frozen=True):
    """A box of a tensor: [offset, offset + size) in each dimension."""

    offsets: _Lengths
    sizes: _Lengths
    at: Stored
    """safetensors with the one tensor `tensor`, of uint8 for a dtype that safetensors does not have; inline, its bare
    bytes in row-major order, little-endian."""


class TensorEntry(msgspec.Struct, frozen=True, tag="tensor"):
    dtype: str
    """torch's name, without `torch.`."""
    size: _Lengths
    requires_grad: bool
    chunks: tuple[TensorChunk, ...]


class PlainEntry(msgspec.Struct, frozen=True, tag="value"):
    at: Stored
    """JSON, as state.py writes it."""


class CheckpointIndex(msgspec.Struct, frozen=True):
    format: Literal["shoal-dcp-1", "shoal-dcp-2"]
    """The first has no ranges."""
    planner_data: Any
    """As state.py writes it."""
    entries: dict[str, TensorEntry | PlainEntry]
    """By fully qualified name."""


def index_folder(checkpoint_id: str) -> str:
    """The folder of the indices of a checkpoint. Raises InvalidParamsError for a name that not every store takes."""
    parts = checkpoint_id.split("/")
    if not all(_COMPONENT.fullmatch(part) and part.strip(".") for part in parts):
        raise InvalidParamsError(
            f"checkpoint id {checkpoint_id!r}: it is one or more names of letters, digits, '.', '_' and '-' with '/' "
            "between them, as in 'run-7/step-100'"
        )
    return f"dcp/{checkpoint_id}/"


def parse_index_key(key: str, folder: str) -> IndexKey | None:
    """Read the name of an index in `folder` itself; None for anything else."""
    found = _STAMPED.fullmatch(key.removeprefix(folder))
    return IndexKey(int(found[1]), ContentId(found[2]), key) if found else None


def is_checkpoint_id(checkpoint_id: str) -> bool:
    try:
        index_folder(checkpoint_id)
    except InvalidParamsError:
        return False
    return True


def versions_in(listed: Iterable[ObjectInfo], folder: str) -> list[IndexKey]:
    """The indices among what was listed under `folder`, newest first."""
    found = (parse_index_key(item.key, folder) for item in listed if item.size <= MAX_INDEX_BYTES)
    return sorted((key for key in found if key is not None), reverse=True)


def encode_index(metadata: Metadata, stored: Mapping[MetadataIndex, Stored]) -> bytes:
    """The index's bytes.

    Raises:
        UnsayableStateError: the planner's data is not plain, or a tensor is not strided.
        InvalidStructureError: no rank wrote something that the metadata names.
    """
    entries: dict[str, TensorEntry | PlainEntry] = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            entries[fqn] = _encoded(fqn, entry, stored)
        else:
            entries[fqn] = PlainEntry(_stored_at(stored, MetadataIndex(fqn)))
    flat = flatten(metadata.planner_data, "planner_data")
    if flat.tensors:
        raise UnsayableStateError(
            f"the planner keeps tensors as its own data ({', '.join(flat.tensors)}); give it none"
        )
    index = CheckpointIndex(format="shoal-dcp-2", planner_data=flat.structure, entries=entries)
    return msgspec.json.encode(index).ljust(MIN_OBJECT_BYTES)


def decode_index(body: bytes, content_id: ContentId) -> Metadata:
    """The metadata again; `storage_data` is {MetadataIndex: Stored}.

    Raises:
        DamagedPartError: the bytes are not those that the name of the index names.
        InvalidStructureError: they are not an index.
    """
    if (found := content_id_of(body) if body else "nothing") != content_id:
        raise DamagedPartError(f"an index should be {content_id} and is {found} ({len(body)} bytes)")
    try:
        index = msgspec.json.decode(body, type=prepared(CheckpointIndex))
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidStructureError(f"it is not an index of a distributed checkpoint: {error}") from None
    stored: dict[MetadataIndex, Stored] = {}
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for fqn, entry in index.entries.items():
        match entry:
            case PlainEntry(at=at):
                stored[MetadataIndex(fqn)] = at
                entries[fqn] = BytesStorageMetadata()
            case TensorEntry():
                entries[fqn] = _decoded(fqn, entry, stored)
    return Metadata(entries, planner_data=rebuild(index.planner_data, {}), storage_data=stored)


def _encoded(fqn: str, entry: TensorStorageMetadata, stored: Mapping[MetadataIndex, Stored]) -> TensorEntry:
    if entry.properties.layout != torch.strided:
        raise UnsayableStateError(f"{fqn!r} has the layout {entry.properties.layout}; make it dense")
    encoded = TensorEntry(
        dtype=dtype_name(entry.properties.dtype),
        size=tuple(entry.size),
        requires_grad=entry.properties.requires_grad,
        chunks=tuple(
            TensorChunk(tuple(chunk.offsets), tuple(chunk.sizes), _stored_at(stored, MetadataIndex(fqn, chunk.offsets)))
            for chunk in entry.chunks
        ),
    )
    _filled(fqn, encoded)
    return encoded


def _filled(fqn: str, entry: TensorEntry) -> None:
    """Raises InvalidStructureError if the chunks do not cover the tensor: a part of it would come back undefined."""
    found = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    if found != math.prod(entry.size):
        raise InvalidStructureError(
            f"{fqn!r} of size {entry.size} has {math.prod(entry.size)} elements, and its chunks {found}; "
            "all ranks that hold a part of it have to save together"
        )


def _stored_at(stored: Mapping[MetadataIndex, Stored], index: MetadataIndex) -> Stored:
    if index not in stored:
        raise InvalidStructureError(f"the plan names {index} and no rank wrote it; the checkpoint was not committed")
    return stored[index]


def _decoded(fqn: str, entry: TensorEntry, stored: dict[MetadataIndex, Stored]) -> TensorStorageMetadata:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise InvalidStructureError(f"{fqn!r} has the dtype {entry.dtype!r}, which this torch does not know")
    chunks = []
    for chunk in entry.chunks:
        box = list(zip(chunk.offsets, chunk.sizes, entry.size, strict=False))
        if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size) or any(at + n > end for at, n, end in box):
            raise InvalidStructureError(f"{fqn!r} of size {entry.size} has a chunk outside of it: {chunk.offsets}")
        stored[MetadataIndex(fqn, chunk.offsets)] = chunk.at
        chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
    _filled(fqn, entry)
    properties = TensorProperties(dtype=dtype, requires_grad=entry.requires_grad)
    return TensorStorageMetadata(properties, torch.Size(entry.size), chunks)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
