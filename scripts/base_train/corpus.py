"""Text for machines that have none at hand: Python's own library as parquet shards at a file:// origin."""

from __future__ import annotations

import asyncio
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from node.origin.publishing import SourceFile, missing_at, publish
from protocol.content import hash_file
from protocol.ids import ShardId
from protocol.manifest import Manifest, ShardEntry, sign_manifest
from protocol.signing import SigningKey
from torch_bridge import O3Client
from torch_bridge.core.loop_thread import loop_thread

NAME = "example/python-library"
MAX_SHARD_BYTES = 250_000
"""One BitTorrent piece: such a shard needs no torrent file beside it."""
_DOCUMENT_CHARACTERS = 1500
"""Files are cut into documents of about so many, at the ends of lines."""


def texts(folder: Path | None = None) -> Iterator[str]:
    """Documents, from the sources of Python's standard library in the order of their names; no tests, no packages."""
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(folder).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        document = ""
        for line in text.splitlines(keepends=True):
            document += line
            if len(document) >= _DOCUMENT_CHARACTERS:
                yield document
                document = ""
        if document:
            yield document


def write_shards(folder: Path, *, shards: int, shard_bytes: int) -> list[Path]:
    """Shards of about so many bytes of text, MAX_SHARD_BYTES at most; fewer if this machine's library is smaller."""
    folder.mkdir(parents=True, exist_ok=True)
    documents, paths = texts(), []
    for number in range(shards):
        rows: list[str] = []
        held = 0
        for text in documents:
            rows.append(text)
            held += len(text.encode())
            if held >= min(shard_bytes, MAX_SHARD_BYTES):
                break
        if not rows:
            break
        path = folder / f"shard_{number:05d}.parquet"
        parquet.write_table(pa.table({"text": rows}), path, row_group_size=64)
        paths.append(path)
    return paths


def publish_to(origin: str, paths: list[Path]) -> Manifest:
    """Put them at an origin ("file:///folder") under NAME, signed by a key that is thrown away."""
    entries = []
    files = {}
    for number, path in enumerate(paths):
        hashed, seen = hash_file(path), path.stat()
        rows = parquet.read_metadata(path).num_rows
        entries.append(
            ShardEntry(
                shard_id=ShardId(number),
                filename=path.name,
                size=hashed.size,
                content_id=hashed.content_id,
                kind="parquet",
                rows=rows,
            )
        )
        files[hashed.content_id] = SourceFile(path, seen.st_size, seen.st_mtime_ns)
    manifest = Manifest(name=NAME, kind="dataset", shards=tuple(entries))
    store = O3Client().at(origin).backing

    async def send() -> None:
        signed = sign_manifest(manifest, SigningKey.generate())
        await publish(store, signed, await missing_at(store, manifest), files, {})

    loop_thread().run(asyncio.wait_for(send(), 60))
    return manifest
