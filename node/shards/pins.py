"""Which shard files stay until a person ends that: all but those that came for a lease alone, which are written down.

A file that lies in the shards folder is pinned, however it came there: pulled, loaded, published, put there by hand. It
has no pin if it came for a lease and nobody asked for it otherwise, or if UNPIN ended its pin. `DATA_DIR/unpinned.json`
lists the files without a pin, each with its size and time, so that another file that takes the name of one is pinned.
What is lost with the list is so a pin too many, never a shard.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

import msgspec

from node.files import Durability, Fingerprint, atomic_write, replace_file
from node.shards.store.catalog import ShardFile
from protocol.manifest import ShardRef
from protocol.structs import prepared

log = logging.getLogger(__name__)

UNPINNED_FILENAME = "unpinned.json"
VERSION = 1
MANY = 10_000
"""Above so many files without a pin, those that are gone are left out at the start. Not earlier: a disk may not be
mounted at that moment.
"""
Unpinned = dict[Path, Fingerprint | None]
"""None while the file is on its way."""


class UnpinnedFile(msgspec.Struct, frozen=True, array_like=True):
    """One file without a pin, in the list."""

    path: str
    """Below the shards folder, percent-encoded: a name of other people's may be no UTF-8."""
    size: int | None
    """Bytes; None, as the next, while the file is on its way."""
    mtime_ns: int | None


class UnpinnedList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in the file."""

    version: int
    files: list[UnpinnedFile]


class Pins:
    """The only writer of the list. `load` it first. Its answers are for the event loop's thread."""

    def __init__(self, data_dir: Path, shards_dir: Path) -> None:
        self._path = data_dir / UNPINNED_FILENAME
        self._root = shards_dir
        self._unpinned: Unpinned = {}
        self._asked: Counter[ShardRef] = Counter()
        self._one_write = asyncio.Lock()
        self._changes = self._written = self._synced = 0
        """How many changes there were, and how many of them are in the file and on the disk."""
        self._warned = False

    def load(self) -> None:
        """Read the list; blocks on the disk. With a damaged one, everything that is here is pinned."""
        try:
            self._unpinned = _decode(self._path.read_bytes(), self._root)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, ValueError) as err:
            damaged = self._path.with_name(self._path.name + ".damaged")
            log.warning(
                "the list of shards without a pin, %s, cannot be read (%s): set aside as %s; every shard that is here "
                "is pinned now, also those that were fetched for training: `shoal unpin NAME` ends a pin",
                self._path,
                err,
                damaged,
            )
            if self._path.exists():
                replace_file(self._path, damaged)
        if len(self._unpinned) > MANY:
            self._unpinned = {path: mark for path, mark in self._unpinned.items() if path.exists()}

    # What is pinned

    def is_pinned(self, file: ShardFile) -> bool:
        """Whether this file stays until a person ends that."""
        if file.path not in self._unpinned:
            return True
        mark = self._unpinned[file.path]
        return mark is not None and file.fingerprint is not None and mark != file.fingerprint

    def keeps(self, ref: ShardRef, files: Iterable[ShardFile]) -> bool:
        """Whether a shard with these files stays: one of them is pinned, or somebody asks for it at this moment."""
        return self._asked[ref] > 0 or any(map(self.is_pinned, files))

    @contextmanager
    def asked_for(self, ref: ShardRef) -> Iterator[None]:
        """The shard stays for the length of the block, at whose end it may be pinned."""
        self._asked[ref] += 1
        try:
            yield
        finally:
            self._asked[ref] -= 1
            if not self._asked[ref]:
                del self._asked[ref]

    # What a person wants

    async def pin(self, paths: Iterable[Path]) -> None:
        """From now on these files stay. When it returns, they do so after a power cut too. Raises OSError."""
        ended = [path for path in paths if path in self._unpinned]
        for path in ended:
            del self._unpinned[path]
        if ended:
            await self._save("name")

    async def unpin(self, files: Iterable[ShardFile]) -> list[ShardFile]:
        """End the pins of these files; returns those that had one. Raises OSError."""
        ended = [file for file in files if self.is_pinned(file)]
        for file in ended:
            self._unpinned[file.path] = file.fingerprint
        if ended:
            await self._save("name")
        return ended

    # What a fetch for a lease, and an eviction, tell. If that cannot be written, the price is a pin too many.

    async def coming(self, path: Path, known: ShardFile | None, *, is_free: bool) -> None:
        """A file is about to come for a lease alone. It gets no pin, unless one with a pin lay there: `known`, or, if
        the path is not free, one that the catalog has not seen yet.
        """
        if is_free or (known is not None and not self.is_pinned(known)):
            self._unpinned[path] = None
            await self._try_to_save()

    async def came(self, path: Path, fingerprint: Fingerprint) -> None:
        """The file that was coming is here."""
        if path in self._unpinned:
            self._unpinned[path] = fingerprint
            await self._try_to_save()

    def did_not_come(self, path: Path) -> None:
        """The file that was coming is not here. The list on the disk learns of it with the next change."""
        if self._unpinned.get(path, Fingerprint(0, 0)) is None:
            del self._unpinned[path]

    async def gone(self, path: Path) -> None:
        """This node deleted the file."""
        if path in self._unpinned:
            del self._unpinned[path]
            await self._try_to_save()

    # The file

    async def _try_to_save(self) -> None:
        try:
            await self._save("process")
        except OSError as err:
            if not self._warned:
                log.warning("%s cannot be written: %s; shards that come for a lease are pinned", self._path, err)
            self._warned = True

    async def _save(self, durability: Durability) -> None:
        """Have all changes until now in the file; changes at one time share a write."""
        self._changes += 1
        mine = self._changes
        async with self._one_write:
            if (self._written if durability == "process" else self._synced) >= mine:
                return
            changes = self._changes
            await asyncio.to_thread(atomic_write, self._path, _encode(self._unpinned, self._root), durability)
            self._written = changes
            if durability == "name":
                self._synced = changes


def pin_from_outside(data_dir: Path, shards_dir: Path, paths: Iterable[Path]) -> None:
    """Pin files from another process than the node's: those of the list get another time, by which a running node finds
    within seconds that they are not what it wrote down. Raises OSError.
    """
    try:
        unpinned = _decode((data_dir / UNPINNED_FILENAME).read_bytes(), shards_dir)
    except (FileNotFoundError, msgspec.MsgspecError, ValueError):
        return  # all are pinned, or will be: see `load`
    for path in paths:
        if path in unpinned:
            os.utime(path)


def _encode(unpinned: Mapping[Path, Fingerprint | None], root: Path) -> bytes:
    files = [
        UnpinnedFile(
            quote_from_bytes(os.fsencode(os.path.relpath(path, root)), safe="/@ +"),
            mark.size if mark else None,
            mark.mtime_ns if mark else None,
        )
        for path, mark in unpinned.items()
    ]
    return msgspec.json.encode(UnpinnedList(VERSION, files))


def _decode(data: bytes, root: Path) -> Unpinned:
    """Raises MsgspecError, ValueError for another version."""
    found = msgspec.json.decode(data, type=prepared(UnpinnedList))
    if found.version != VERSION:
        raise ValueError(f"it has version {found.version}, this node writes {VERSION}")
    unpinned: Unpinned = {}
    for file in found.files:
        path = root / os.fsdecode(unquote_to_bytes(file.path))
        if file.size is not None and file.mtime_ns is not None:
            unpinned[path] = Fingerprint(file.size, file.mtime_ns)
        elif mark := Fingerprint.of(path):  # it came, and the node ended before it wrote that down
            unpinned[path] = mark
    return unpinned
