"""Where files come from: a list of them, and each of them onto the disk."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from protocol.errors import (
    OriginCorruptError,
    OriginNotFoundError,
    ShardNotFoundError,
    ShoalError,
)
from protocol.manifest import ShardEntry
from torch_bridge.batches.plan import RemoteFile
from torch_bridge.batches.sources.ranged import OnBytes, fetch_pieces
from torch_bridge.core.store import Store
from torch_bridge.shards.sources.interface import ShardSource

_log = logging.getLogger(__name__)


class FileSource(Protocol):
    """Files under one name. Thread-safe; travels to other processes by fork and by pickle."""

    @property
    def name(self) -> str:
        """As it may be shown."""

    @property
    def in_order(self) -> bool:
        """Whether files come well only one by one in the order of `list`, as out of a compressed tar."""

    def list(self, notes: Path) -> Sequence[RemoteFile]:
        """All files. `notes` is a folder of this machine where a source may keep what was dear to find out.

        Raises OriginError and the like.
        """

    def fetch(self, file: RemoteFile, target: Path, *, stop: threading.Event, on_bytes: OnBytes) -> Path:
        """Bring a file here and say where it is: at `target`, or where the source itself keeps it. It is there whole or
        not at all; `target` with `.part` behind its name is what a fetch that was broken off may go on with.

        Raises OriginNotFoundError where it has vanished, OriginCorruptError where it is another than it was listed,
        CancelledRequestError where `stop` was set, OSError of the disk, OriginError and the like else.
        """

    def release(self, file: RemoteFile) -> None:
        """A file that the source keeps itself is not needed any more; one at `target` is deleted by who gave that."""

    def read(self, key: str) -> bytes:
        """A small file, in memory: metadata."""


class OriginFiles:
    """The objects of a store: Akave O3, S3, a web server, a folder."""

    in_order = False

    def __init__(self, store: Store, *, suffixes: tuple[str, ...] = ()) -> None:
        """With `suffixes` only keys that end in one of them."""
        self._store = store
        self._suffixes = suffixes

    @property
    def name(self) -> str:
        return self._store.url

    def list(self, notes: Path) -> Sequence[RemoteFile]:
        """See FileSource."""
        return [
            RemoteFile(info.key, info.size, _bare(info.etag))
            for info in self._store.list()
            if info.size > 0 and (not self._suffixes or info.key.endswith(self._suffixes))
        ]

    def fetch(self, file: RemoteFile, target: Path, *, stop: threading.Event, on_bytes: OnBytes) -> Path:
        """See FileSource. Several ranges at once; goes on with what an earlier fetch has left."""
        part = fetch_pieces(
            f"{self.name}: {file.key!r}", file.size, target,
            lambda start, end: self._store.aio.get_range(file.key, start, end), stop, on_bytes,
        )  # fmt: skip
        # The pieces came one by one: they are of one object only if it is the same still.
        found = self._store.head(file.key)
        if found.size != file.size or (file.validator and found.etag and _bare(found.etag) != file.validator):
            part.unlink()
            raise OriginCorruptError(
                f"{self.name}: {file.key!r} is another file than it was when this epoch was listed ({file.size} bytes, "
                f"ETag {file.validator or 'none'}; now {found.size}, {found.etag}): the next epoch lists anew; leave "
                "the files of a running epoch as they are",
                {"origin": self.name, "key": file.key, "changed": True},
            )
        part.replace(target)
        return target

    def release(self, file: RemoteFile) -> None:
        """See FileSource."""

    def read(self, key: str) -> bytes:
        """See FileSource."""
        return self._store.get(key)


class SwarmFiles:
    """The shards of a data set: through this machine's node from peers first, or straight from an origin."""

    in_order = False

    def __init__(self, shards: ShardSource) -> None:
        self._shards = shards
        self._later: list[RemoteFile] = []

    @property
    def name(self) -> str:
        return f"data set {self._shards.manifest().name}"

    def list(self, notes: Path) -> Sequence[RemoteFile]:
        """See FileSource; the validator is the content id."""
        return [RemoteFile(entry.filename, entry.size, entry.content_id) for entry in self._shards.manifest().shards]

    def fetch(self, file: RemoteFile, target: Path, *, stop: threading.Event, on_bytes: OnBytes) -> Path:
        """See FileSource. The shard lies where its source keeps it, checked against its content id."""
        done = 0

        def progress(now: int, _: int) -> None:
            nonlocal done
            on_bytes(now - done)
            done = now

        return self._shards.fetch(self._entry(file.key), stop=stop, on_progress=progress).path

    def release(self, file: RemoteFile) -> None:
        """See FileSource. It stays where another consumer of this machine holds it; while the node is away, until the
        next file is given up.
        """
        later, self._later = self._later, []
        for one in (*later, file):
            try:
                self._shards.discard(self._entry(one.key))
            except ShoalError as error:
                if not error.retryable:
                    raise
                _log.warning("%s is deleted later: %s", one.key, error)
                self._later.append(one)

    def read(self, key: str) -> bytes:
        """See FileSource."""
        entry = self._entry(key)
        try:
            return self._shards.fetch(entry).path.read_bytes()
        finally:
            self._shards.discard(entry)

    def _entry(self, key: str) -> ShardEntry:
        manifest = self._shards.manifest()
        for entry in manifest.shards:
            if entry.filename == key:
                return entry
        raise ShardNotFoundError(f"data set {manifest.name} has no shard {key!r}", {"name": manifest.name})


def vanished(error: Exception) -> bool:
    """Whether a file is not there any more."""
    return isinstance(error, OriginNotFoundError | ShardNotFoundError)


def _bare(etag: str | None) -> str:
    return (etag or "").removeprefix("W/").strip('"')
