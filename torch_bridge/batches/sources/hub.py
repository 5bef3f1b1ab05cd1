"""Files of a Hugging Face repository, through huggingface_hub's own file system."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from node.files import replace_file
from node.origin.core.fork_guard import no_fork
from node.origin.huggingface.file_system import HubFileSystem
from node.origin.url import OriginUrl
from torch_bridge.batches.plan import RemoteFile
from torch_bridge.batches.sources.range_file import PIECE_BYTES, OnBytes, fetch_pieces
from torch_bridge.core.location import with_secrets
from torch_bridge.core.loop_thread import loop_thread
from torch_bridge.core.store import Store

T = TypeVar("T")


class HubFiles:
    """The files of a repository, or of a folder in it, all of the commit that the branch meant when they were listed.

    A file's validator is its hash and that commit: a push in the middle of an epoch changes nothing in it.
    huggingface_hub repeats the requests of a listing; the store's RetryPolicy repeats all others.
    """

    in_order = False

    def __init__(self, store: Store, *, suffixes: tuple[str, ...] = ()) -> None:
        """`store` is of an hf:// URL. With `suffixes` only files whose names end in one of them."""
        self._store = store
        self._suffixes = suffixes
        self._opened: tuple[int, HubFileSystem] | None = None

    @property
    def name(self) -> str:
        return self._store.url

    def list(self, notes: Path) -> Sequence[RemoteFile]:
        """See FileSource."""
        commit = self._call(lambda hub: hub.commit())
        return [
            RemoteFile(info.key, info.size, f"{info.etag}@{commit}")
            for info in self._call(lambda hub: hub.list(commit))
            if info.size > 0 and (not self._suffixes or info.key.endswith(self._suffixes))
        ]

    def fetch(self, file: RemoteFile, target: Path, *, stop: threading.Event, on_bytes: OnBytes) -> Path:
        """See FileSource. Several ranges at once, of the commit in the validator; continues an earlier fetch."""
        commit = file.validator.partition("@")[2]

        async def read(start: int, end: int) -> bytes:
            return await self._called(lambda hub: hub.read(file.key, commit, start, end))

        part = fetch_pieces(f"{self.name}: {file.key!r}", file.size, target, read, stop, on_bytes)
        return replace_file(part, target)

    def release(self, file: RemoteFile) -> None:
        """See FileSource."""

    def read(self, key: str) -> bytes:
        """See FileSource."""
        commit = self._call(lambda hub: hub.commit())
        size = self._call(lambda hub: hub.size(key, commit))

        def read(start: int) -> bytes:
            return self._call(lambda hub: hub.read(key, commit, start, min(start + PIECE_BYTES, size)))

        return b"".join(map(read, range(0, size, PIECE_BYTES)))

    def _call(self, ask: Callable[[HubFileSystem], T]) -> T:
        return loop_thread().run(self._called(ask))

    async def _called(self, ask: Callable[[HubFileSystem], T]) -> T:
        return await self._store.location.retry.run(lambda _: asyncio.to_thread(lambda: ask(self._hub())))

    def _hub(self) -> HubFileSystem:
        """This process's."""
        with no_fork():
            if self._opened is None or self._opened[0] != os.getpid():
                settings = with_secrets(self._store.location.settings, "hf")
                self._opened = os.getpid(), HubFileSystem(OriginUrl.parse(self._store.url), settings)
            return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self._store, "suffixes": self._suffixes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["store"], suffixes=state["suffixes"])  # type: ignore[misc]
