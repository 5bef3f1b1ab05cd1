"""The process that reads and parses shard files: `python -m node.shards.store.hash_worker`.

Hashing holds the GIL for as long as it takes, and parsing a hostile file may end a process: neither happens in the
daemon. Frames of 4 bytes of length (big-endian) and MessagePack: a `Job` on stdin, any number of `Advance` and then
one other answer on stdout.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from node.formats.gguf import read_gguf
from node.formats.hyperparameters import ModelSizes, model_sizes
from node.formats.kinds import check_shard
from protocol.content import hash_file
from protocol.errors import InvalidShardError
from protocol.manifest import ShardKind
from protocol.structs import prepared


class Job(msgspec.Struct, frozen=True):
    """What to do with one file."""

    path: bytes
    """As the file system has it."""
    kind: ShardKind
    check: bool
    """Check its structure."""
    hash: bool
    sizes: bool = False
    """Read the sizes in the header of a GGUF."""
    progress_s: float = 0.25
    """Between one `Advance` and the next."""


class Advance(msgspec.Struct, frozen=True, tag="advance"):
    """Bytes hashed so far."""

    bytes_done: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The file is in order; it had this size and time before and after it was read."""

    size: int
    mtime_ns: int
    content_id: str | None
    piece_layer: bytes
    rows: int | None = None
    """Of a parquet file whose structure was looked at."""
    sizes: ModelSizes | None = None
    """Of a GGUF, if they were asked for."""


class Changed(msgspec.Struct, frozen=True, tag="changed"):
    """Somebody wrote to the file while it was read."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The file is not what its kind must be."""

    reason: str


class Unreadable(msgspec.Struct, frozen=True, tag="unreadable"):
    """The system did not let us read it."""

    reason: str


Answer = Advance | Done | Changed | Refused | Unreadable


def do(job: Job, answers: BinaryIO) -> Answer:
    """Do one job; `Advance` goes straight to `answers`, the last answer is returned."""
    path = Path(os.fsdecode(job.path))
    reported_at = time.monotonic()

    def advance(bytes_done: int) -> None:
        nonlocal reported_at
        if time.monotonic() - reported_at >= job.progress_s:
            reported_at = time.monotonic()
            write_frame(answers, msgspec.msgpack.encode(Advance(bytes_done)))

    try:
        before = path.stat()
        rows = check_shard(path, job.kind) if job.check else None
        sizes = model_sizes(read_gguf(path)) if job.sizes else None
        content = hash_file(path, advance) if job.hash else None
        after = path.stat()
    except InvalidShardError as err:
        return Refused(err.message)
    except OSError as err:
        if isinstance(err, BrokenPipeError):
            raise
        return Unreadable(err.strerror or str(err))
    except ValueError as err:
        return Refused(str(err))
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        return Changed()
    if content is None:
        return Done(after.st_size, after.st_mtime_ns, None, b"", rows, sizes)
    if content.size != after.st_size:
        return Changed()
    return Done(after.st_size, after.st_mtime_ns, content.content_id, content.piece_layer, rows, sizes)


def write_frame(stream: BinaryIO, data: bytes) -> None:
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def main() -> None:
    # Ctrl-C reaches the whole process group; the daemon closes stdin when it is time to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while header := sys.stdin.buffer.read(4):
        job = msgspec.msgpack.decode(sys.stdin.buffer.read(int.from_bytes(header, "big")), type=prepared(Job))
        write_frame(answers, msgspec.msgpack.encode(do(job, answers)))


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.exit(1)
