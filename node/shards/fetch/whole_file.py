"""A shard that has no torrent anywhere yet: it comes whole from an origin, and is checked by its content id at the end.

What came lies in a file of its own, `<name>.whole.part`: it is no download of the swarm, which reserves all of its
space at the start and knows by a piece layer what it has. Here the length of the file is what there is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from node.background import to_the_end
from node.shards.fetch.job import Fetch, FetchProgress
from node.shards.fetch.origin_selector import Supply
from node.shards.interfaces import OriginPlace
from node.shards.store.disk_space import whole_part_of
from protocol.content import ContentHash, ContentHasher
from protocol.errors import OriginError

READ_BYTES = 1024 * 1024
RETRY_S = 0.25
TELL_S = 0.25


class Whole:
    """One shard on its way from origins, in one stream at a time."""

    def __init__(self, supply: Supply, fetch: Fetch, path: Path, patience_s: float, lull_s: float = 0.0) -> None:
        self.supply = supply
        self.part = whole_part_of(path)
        self.origin_bytes = 0
        """That came, wrong ones with them."""
        self._fetch = fetch
        self._entry = entry = fetch.entry
        self._patience_s = patience_s + lull_s
        self._silence_s = patience_s / 2 + lull_s
        self._hasher = ContentHasher(entry.size)
        self._givers: list[OriginPlace] = []
        self._told = (0.0, 0)
        self._foreign = False
        """Whether some of the bytes are of an earlier try."""
        self._mixed = False
        """Whether it was wrong before, and not known whose bytes were."""

    @property
    def bytes_done(self) -> int:
        return self._hasher.seen

    async def fetch(self, failed: Callable[[], Exception]) -> ContentHash:
        """Have `part` whole and right. Raises `failed()` where no origin gives it; what may be right is kept.

        What is wrong is set aside as `.invalid`, and the next origin asked from the start.
        """
        loop = asyncio.get_running_loop()
        self._file = await asyncio.to_thread(_open, self.part)
        try:
            await to_the_end(self._take_up)
            moved_at = loop.time()
            while True:
                if self.bytes_done == self._entry.size:
                    content = self._hasher.result()
                    if content.content_id == self._entry.content_id:
                        return content
                    await to_the_end(self._set_aside)
                    continue
                place = self.supply.next_place(loop.time())
                if self.supply.exhausted or (not place and loop.time() - moved_at >= self._patience_s):
                    raise failed()
                if not place:
                    await asyncio.sleep(RETRY_S)
                    continue
                before = self.bytes_done
                try:
                    await self._stream(place)
                except OriginError as err:
                    self.supply.failed(place, err, loop.time())
                if self.bytes_done > before:
                    moved_at = loop.time()
                elif loop.time() - moved_at >= self._patience_s:
                    raise failed()
        finally:
            await asyncio.to_thread(self._file.close)

    def _take_up(self) -> None:
        """Hash what an earlier try left."""
        while data := self._file.read(min(READ_BYTES, self._entry.size - self.bytes_done)):
            self._hasher.update(data)
        self._file.truncate(self.bytes_done)
        self._foreign = self.bytes_done > 0

    async def _stream(self, place: OriginPlace) -> None:
        if place not in self._givers:
            self._givers.append(place)
        stream = place.stream(self._entry, self.bytes_done, self._entry.size)
        try:
            while self.bytes_done < self._entry.size:
                chunk = await self.supply.next_chunk(place, stream, self._silence_s)
                self.origin_bytes += len(chunk)
                await to_the_end(self._write, chunk[: self._entry.size - self.bytes_done])
                self._tell()
        finally:
            if close := getattr(stream, "aclose", None):
                await close()

    def _tell(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._told[0] >= TELL_S:
            rate = (self.origin_bytes - self._told[1]) / (now - self._told[0]) if self._told[0] else 0.0
            self._told = (now, self.origin_bytes)
            self._fetch.tell(FetchProgress("downloading", self.bytes_done, self._entry.size, rate))

    def _write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hasher.update(chunk)

    def _set_aside(self) -> None:
        """The bytes are not the shard's: begin again from nothing, without who gave them."""
        self._file.close()
        self.part.replace(self.part.with_name(self._entry.filename + ".invalid"))
        self._file = _open(self.part)
        # Of several it is not known who was wrong: once they may try again.
        if self._mixed or not (self._foreign or len(self._givers) > 1):
            for place in self._givers:
                self.supply.gave_wrong(place, "a file")
        else:
            self._mixed = True
        self._foreign = False
        self._givers.clear()
        self._hasher = ContentHasher(self._entry.size)


def _open(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path.open("r+b")
