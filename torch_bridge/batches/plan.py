"""Which consumer gets which file when, with which others on the disk. Pure: no files, no network, no clock."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protocol.errors import InvalidParamsError


@dataclass(frozen=True, slots=True, order=True)
class RemoteFile:
    """One file at a source."""

    key: str
    """Its name at the source."""
    size: int
    """Bytes."""
    validator: str = ""
    """Changes with the file: an ETag, a content id, a CRC. "" if the source has none."""

    @property
    def identity(self) -> str:
        """A name for the disk, which another version of the file does not have: 24 hex digits."""
        return hashlib.sha256(f"{self.key}\0{self.size}\0{self.validator}".encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class FileBatch:
    """Files that are on the disk together."""

    number: int
    """From 0, in this run through this consumer's part of the epoch."""
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Consumer:
    """One of the readers that share the files: a worker of a rank."""

    index: int
    """Among all."""
    count: int
    local_index: int
    """Among those on this machine, which share its disk."""
    local_count: int


def epoch_order(files: Iterable[RemoteFile], seed: int, epoch: int, *, shuffle: bool = True) -> list[RemoteFile]:
    """All files in the order of an epoch. It depends on their names, not on a listing's order or length: a file that is
    added or taken away leaves the others in their order. Unshuffled, the order given.
    """
    return sorted(files, key=lambda file: _rank(file, seed, epoch, 0)) if shuffle else list(files)


def pass_order(files: Sequence[RemoteFile], seed: int, epoch: int, number: int, *, shuffle: bool) -> list[RemoteFile]:
    """The order of a batch in pass `number` of it: at first as it comes, then another each time."""
    if number == 0 or not shuffle:
        return list(files)
    return sorted(files, key=lambda file: _rank(file, seed, epoch, number))


def own_share(order: Sequence[RemoteFile], consumer: Consumer) -> list[RemoteFile]:
    """Every `count`-th file: each file is in the share of exactly one consumer."""
    return list(order[consumer.index :: consumer.count])


def part_of(total: int, consumer: Consumer) -> int:
    """This consumer's part of what the consumers of one machine divide; the parts sum to `total`."""
    whole, left = divmod(total, consumer.local_count)
    return whole + (consumer.local_index < left)


def plan_batches(files: Iterable[RemoteFile], cache_size: int, max_bytes: int) -> list[FileBatch]:
    """Batches of at most `cache_size` files, in the order given. One ends early if it would exceed half of
    `max_bytes`, so that two fit. A file above half is a batch of its own.

    Raises InvalidParamsError for a file above `max_bytes`: it never fits.
    """
    batches: list[FileBatch] = []
    current: list[RemoteFile] = []
    size = 0
    for file in files:
        if file.size > max_bytes:
            raise InvalidParamsError(
                f"{file.key!r} has {file.size} bytes and the disk may hold {max_bytes} (max_bytes, divided among the "
                "consumers of this machine): raise max_bytes, use fewer workers, or leave the file out"
            )
        if current and (len(current) == cache_size or size + file.size > max_bytes // 2):
            batches.append(FileBatch(len(batches), tuple(current)))
            current, size = [], 0
        current.append(file)
        size += file.size
    if current:
        batches.append(FileBatch(len(batches), tuple(current)))
    return batches


def _rank(file: RemoteFile, seed: int, epoch: int, number: int) -> tuple[bytes, str]:
    text = f"{seed}\0{epoch}\0{number}\0{file.key}".encode()
    return hashlib.blake2b(text, digest_size=16).digest(), file.key
