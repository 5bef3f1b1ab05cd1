"""Checks and hashes files in a process of its own, one after the other."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from node.files import Fingerprint
from node.formats.hyperparameters import ModelSizes
from node.shards.store.hash_worker import Advance, Answer, Changed, Done, Job, Refused, Unreadable
from protocol.content import ContentHash
from protocol.errors import CancelledRequestError, InvalidShardError
from protocol.ids import ContentId
from protocol.manifest import ShardKind
from protocol.structs import prepared

log = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[3]
_STOP_S = 1.0


class Hashed(NamedTuple):
    """A file as it was when it was hashed."""

    fingerprint: Fingerprint
    content: ContentHash
    rows: int | None = None
    """Of a parquet file whose structure was checked."""


class FileChangedError(Exception):
    """Raised when a file was written to while it was read: look again once it is quiet."""


class Hasher:
    """One long-lived process, started at the first job and again if it dies.

    A job whose process dies is tried a second time; a file that ends two processes is called invalid.
    """

    def __init__(self, progress_s: float = 0.25) -> None:
        self._progress_s = progress_s
        """How often a job tells how far it is."""
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._closed = False
        self.hashed_bytes = 0
        """Of files hashed since the start."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def check(self, path: Path, kind: ShardKind) -> Fingerprint:
        """Check a file's structure. Raises InvalidShardError, FileChangedError or OSError."""
        done = await self._run(Job(os.fsencode(path), kind, check=True, hash=False), None)
        return Fingerprint(done.size, done.mtime_ns)

    async def model_sizes(self, path: Path) -> ModelSizes:
        """The sizes in a GGUF's header. Raises InvalidShardError, FileChangedError or OSError."""
        done = await self._run(Job(os.fsencode(path), "gguf", check=False, hash=False, sizes=True), None)
        assert done.sizes is not None, "the worker was asked for them"
        return done.sizes

    async def hash(
        self, path: Path, kind: ShardKind, *, check: bool = True, progress: Callable[[int], None] | None = None
    ) -> Hashed:
        """Check a file's structure if asked to, and hash it. Raises InvalidShardError, FileChangedError or OSError."""
        done = await self._run(
            Job(os.fsencode(path), kind, check=check, hash=True, progress_s=self._progress_s), progress
        )
        self.hashed_bytes += done.size
        content = ContentHash(done.size, ContentId(done.content_id or ""), done.piece_layer)
        return Hashed(Fingerprint(done.size, done.mtime_ns), content, done.rows)

    async def close(self) -> None:
        """End the process, also in the middle of a file."""
        self._closed = True
        await self._stop()

    async def _run(self, job: Job, progress: Callable[[int], None] | None) -> Done:
        async with self._lock:
            for attempt in (1, 2):
                try:
                    answer = await self._ask(job, progress)
                    break
                except (asyncio.IncompleteReadError, BrokenPipeError, ConnectionResetError):
                    log.warning("the hashing process died on %s (attempt %d)", os.fsdecode(job.path), attempt)
                    await self._stop()
                except BaseException:
                    # Its answer would be taken for that of the next job.
                    await self._stop()
                    raise
            else:
                raise InvalidShardError(
                    f"{Path(os.fsdecode(job.path)).name} ended the process that reads it twice: it is not trusted"
                )
        match answer:
            case Done():
                return answer
            case Changed():
                raise FileChangedError(os.fsdecode(job.path))
            case Unreadable(reason):
                raise OSError(reason)
            case Refused(reason):
                raise InvalidShardError(reason)
        raise AssertionError(answer)

    async def _ask(self, job: Job, progress: Callable[[int], None] | None) -> Answer:
        process = await self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        data = msgspec.msgpack.encode(job)
        process.stdin.write(len(data).to_bytes(4, "big") + data)
        await process.stdin.drain()
        while True:
            length = int.from_bytes(await process.stdout.readexactly(4), "big")
            answer: Answer = msgspec.msgpack.decode(await process.stdout.readexactly(length), type=prepared(Answer))
            if not isinstance(answer, Advance):
                return answer
            if progress:
                progress(answer.bytes_done)

    async def _started(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise CancelledRequestError("the node is stopping: nothing is hashed any more")
        if self._process is None:
            path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "node.shards.store.hash_worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
            )
        return self._process

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        if process.returncode is None and self._lock.locked():
            process.kill()
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


class Hashers(NamedTuple):
    """The hashing processes of a node, so that what a client waits for is not behind a long file."""

    background: Hasher
    """Reads what the scanner found."""
    urgent: Hasher
    """Reads what a client waits for."""
    headers: Hasher
    """Reads headers alone."""
