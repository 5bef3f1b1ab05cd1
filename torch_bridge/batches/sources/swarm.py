"""SwarmFiles: the shards of a data set as files, through this machine's node or straight from an origin."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from protocol.errors import ShardNotFoundError, ShoalError
from protocol.manifest import ShardEntry
from torch_bridge.batches.plan import RemoteFile
from torch_bridge.batches.sources.range_file import OnBytes
from torch_bridge.shards.sources.interface import ShardSource

_log = logging.getLogger(__name__)


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
        """See FileSource. The shard is where its source keeps it, checked against its content id."""
        done = 0

        def progress(now: int, _: int) -> None:
            nonlocal done
            on_bytes(now - done)
            done = now

        return self._shards.fetch(self._entry(file.key), stop=stop, on_progress=progress).path

    def release(self, file: RemoteFile) -> None:
        """See FileSource. It stays if another consumer of this machine holds it, and, while the node is away, until
        the next release.
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
