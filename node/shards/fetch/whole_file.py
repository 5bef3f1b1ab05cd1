"""Downloads a shard that has no torrent anywhere: whole from an origin, checked by its content id at the end.

What came lies in a file of its own, `<name>.whole.part`: it is not a download of the swarm, which reserves all of its
space at the start and knows by a piece layer what it has. Here the length of the file is how far the download is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from node.background import to_the_end
from node.clock import Clock
from node.files import invalid_path, replace_file, whole_part_path
from node.shards.fetch.job import FetchJob
from node.shards.fetch.origin_selector import OriginSelector
from node.shards.interfaces import OriginReader
from node.swarm.torrent import DownloadProgress
from protocol.content import ContentHash, ContentHasher
from protocol.errors import OriginError

READ_BYTES = 1024 * 1024
RETRY_S = 0.25
REPORT_S = 0.25


class WholeFileDownload:
    """One shard from origins, in one stream at a time."""

    def __init__(
        self, selector: OriginSelector, job: FetchJob, path: Path, clock: Clock, *, patience_s: float, lull_s: float
    ) -> None:
        """`patience_s`: how long no byte may come; `lull_s`: how long a working origin may be silent beside that."""
        self.part = whole_part_path(path)
        self.origin_bytes = 0
        """That came, wrong ones with them."""
        self._selector = selector
        self._job = job
        self._invalid = invalid_path(path)
        self._entry = entry = job.shard.entry
        self._clock = clock
        self._patience_s = patience_s + lull_s
        self._silence_s = patience_s / 2 + lull_s
        self._hasher = ContentHasher(entry.size)
        self._givers: list[OriginReader] = []
        self._reported = (0.0, 0)
        self._is_resumed = False
        """Whether some of the bytes are of an earlier try."""
        self._was_mixed = False
        """Whether it was wrong before, and not known whose bytes were."""

    @property
    def bytes_done(self) -> int:
        return self._hasher.seen

    async def run(self, failed: Callable[[], Exception]) -> ContentHash:
        """Have `part` whole and right. Raises `failed()` if no origin gives it; what may be right is kept.

        A file that is wrong is renamed to `.invalid`, and the next origin is asked from the start.
        """
        self._file = await asyncio.to_thread(_open, self.part)
        try:
            await to_the_end(self._resume)
            moved_at = self._clock.now()
            while True:
                if self.bytes_done == self._entry.size:
                    content = self._hasher.result()
                    if content.content_id == self._entry.content_id:
                        return content
                    await to_the_end(self._set_aside)
                    continue
                origin = self._selector.next_origin()
                if self._selector.exhausted or (not origin and self._clock.now() - moved_at >= self._patience_s):
                    raise failed()
                if not origin:
                    await self._clock.sleep(RETRY_S)
                    continue
                before = self.bytes_done
                try:
                    await self._stream(origin)
                except OriginError as err:
                    self._selector.failed(origin, err)
                if self.bytes_done > before:
                    moved_at = self._clock.now()
                elif self._clock.now() - moved_at >= self._patience_s:
                    raise failed()
        finally:
            await asyncio.to_thread(self._file.close)

    def _resume(self) -> None:
        """Hash what an earlier try left."""
        while data := self._file.read(min(READ_BYTES, self._entry.size - self.bytes_done)):
            self._hasher.update(data)
        self._file.truncate(self.bytes_done)
        self._is_resumed = self.bytes_done > 0

    async def _stream(self, origin: OriginReader) -> None:
        if origin not in self._givers:
            self._givers.append(origin)
        stream = origin.stream(self._entry, self.bytes_done, self._entry.size)
        try:
            while self.bytes_done < self._entry.size:
                chunk = await self._selector.next_chunk(origin, stream, self._silence_s)
                self.origin_bytes += len(chunk)
                await to_the_end(self._write, chunk[: self._entry.size - self.bytes_done])
                self._report()
        finally:
            if close := getattr(stream, "aclose", None):
                await close()

    def _report(self) -> None:
        now = self._clock.now()
        if now - self._reported[0] >= REPORT_S:
            rate = (self.origin_bytes - self._reported[1]) / (now - self._reported[0]) if self._reported[0] else 0.0
            self._reported = (now, self.origin_bytes)
            self._job.report(DownloadProgress(self.bytes_done, self._entry.size, rate))

    def _write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._hasher.update(chunk)

    def _set_aside(self) -> None:
        """The bytes are not the shard's: begin again from nothing, without the origins that gave them."""
        self._file.close()
        replace_file(self.part, self._invalid)
        self._file = _open(self.part)
        # Of several origins it is not known which was wrong: all may try once more.
        if self._was_mixed or not (self._is_resumed or len(self._givers) > 1):
            for origin in self._givers:
                self._selector.gave_wrong(origin, "a file")
        else:
            self._was_mixed = True
        self._is_resumed = False
        self._givers.clear()
        self._hasher = ContentHasher(self._entry.size)


def _open(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path.open("r+b")
