"""Named tensors -> safetensors files of bounded size, each known by its content id.

The grouping follows from names and sizes alone, so a part whose tensors did not change has the same bytes as in the
checkpoint before, and is at the origin already. A part holds whole tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load, save

from protocol.content import ContentHasher
from protocol.ids import ContentId

PART_BYTES = 64 * 1024 * 1024
"""A part ends before it would exceed this; a tensor that is larger has a part of its own."""


class DamagedPartError(ValueError):
    """Raised when a part's bytes are not those that its content id names."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a checkpoint."""

    names: tuple[str, ...]
    """The tensors in it, in order."""

    body: bytes
    """safetensors."""

    content_id: ContentId


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
    """The parts of `tensors`, made one at a time. The tensors are on the CPU and nobody writes to them meanwhile."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    for names in group(sizes, bound_bytes):
        # Cloned: tied weights share memory, which safetensors refuses, and a view would drag its whole storage along.
        body = save({name: tensors[name].detach().clone(memory_format=torch.contiguous_format) for name in names})
        yield Part(names=names, body=body, content_id=content_id_of(body))


def unpack(body: bytes, content_id: ContentId) -> dict[str, torch.Tensor]:
    """The tensors of a part, checked against its content id before anything in it is looked at.

    Raises:
        DamagedPartError: these are other bytes.
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
