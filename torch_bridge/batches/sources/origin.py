"""OriginFiles: the objects of a store as files."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from node.files import replace_file
from protocol.errors import OriginCorruptError
from torch_bridge.batches.plan import RemoteFile
from torch_bridge.batches.sources.range_file import OnBytes, fetch_pieces
from torch_bridge.core.store import Store


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
        """See FileSource. Several ranges at once; continues an earlier fetch."""
        part = fetch_pieces(
            f"{self.name}: {file.key!r}",
            file.size,
            target,
            lambda start, end: self._store.aio.get_range(file.key, start, end),
            stop,
            on_bytes,
        )
        # The ranges came one by one: they are of one object only if it is still the same.
        found = self._store.head(file.key)
        if found.size != file.size or (file.validator and found.etag and _bare(found.etag) != file.validator):
            part.unlink()
            raise OriginCorruptError(
                f"{self.name}: {file.key!r} is another file than it was when this epoch was listed ({file.size} bytes, "
                f"ETag {file.validator or 'none'}; now {found.size}, {found.etag}): the next epoch lists again; leave "
                "the files of a running epoch as they are",
                {"origin": self.name, "key": file.key, "changed": True},
            )
        return replace_file(part, target)

    def release(self, file: RemoteFile) -> None:
        """See FileSource."""

    def read(self, key: str) -> bytes:
        """See FileSource."""
        return self._store.get(key)


def _bare(etag: str | None) -> str:
    return (etag or "").removeprefix("W/").strip('"')
