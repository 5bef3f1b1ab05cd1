"""What a sample is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from protocol.errors import InvalidParamsError, InvalidShardError
from torch_bridge.objects.listing import ListedObject
from torch_bridge.objects.range_reader import ObjectRange, RangeReader

Decode = Callable[[Any], Any]
"""Turns a sample into what the user wants."""


class SampleIndex(NamedTuple):
    """Which sample: the number of the object in the listing, and the number of the sample in it."""

    item: int
    sample: int


class Samples(Protocol):
    """The samples of a list of objects. It can be pickled."""

    @property
    def counts(self) -> Sequence[int]:
        """Samples of each object."""

    def read(self, reader: RangeReader, indices: Sequence[SampleIndex], decode: Decode | None) -> list[Any]:
        """The samples, each through `decode` if there is one, in the order asked for."""


class SampleFormat(Protocol):
    """How objects are cut into samples."""

    pattern: str
    """Keys (fnmatch) of the objects that have this format."""

    def open(self, objects: Sequence[ListedObject], reader: RangeReader) -> Samples:
        """Read what is needed to find samples. Raises InvalidShardError for an object that has not this format."""


@dataclass(frozen=True)
class WholeObjects:
    """A sample is an object's bytes."""

    pattern: str = "*"

    def open(self, objects: Sequence[ListedObject], reader: RangeReader) -> Samples:
        return _Records(objects, [1] * len(objects), 0, 0)


@dataclass(frozen=True)
class RecordFormat:
    """A sample is a record of `record_bytes`; objects begin with `header_bytes` that are in no record."""

    record_bytes: int
    header_bytes: int = 0
    pattern: str = "*"

    def __post_init__(self) -> None:
        if self.record_bytes < 1 or self.header_bytes < 0:
            raise InvalidParamsError(f"{self}: record_bytes must be 1 or more, header_bytes 0 or more")

    def open(self, objects: Sequence[ListedObject], reader: RangeReader) -> Samples:
        counts = []
        for item in objects:
            count, rest = divmod(item.size - self.header_bytes, self.record_bytes)
            if rest or count < 0:
                raise InvalidShardError(
                    f"{item.key} has {item.size} bytes, not a header of {self.header_bytes} and whole records of "
                    f"{self.record_bytes}: check record_bytes and header_bytes, or leave the object out by `match`"
                )
            counts.append(count)
        return _Records(objects, counts, self.header_bytes, self.record_bytes)


@dataclass(frozen=True)
class _Records:
    objects: Sequence[ListedObject]
    counts: Sequence[int]
    header_bytes: int
    record_bytes: int
    """0: all of the object."""

    def read(self, reader: RangeReader, indices: Sequence[SampleIndex], decode: Decode | None) -> list[Any]:
        wanted = []
        for item, sample in indices:
            start = self.header_bytes + sample * self.record_bytes
            end = start + self.record_bytes if self.record_bytes else self.objects[item].size
            wanted.append(ObjectRange(self.objects[item], start, end))
        return reader.read(wanted, decode)
