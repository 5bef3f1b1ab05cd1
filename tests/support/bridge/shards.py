"""What tests of data shards share: parquet files, and a data set of them at an origin."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from node.origin.publishing import SourceFile, missing_at, publish
from protocol.content import hash_file
from protocol.ids import ContentId, ShardId
from protocol.manifest import Manifest, ShardEntry, sign_manifest
from protocol.signing import SigningKey
from torch_bridge.core.loop_thread import loop_thread
from torch_bridge.core.store import Store

ROWS = 200


def parquet_files(folder: Path, count: int, *, row_bytes: int = 500) -> list[Path]:
    """Small ones that do not compress."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        rows = [(f"{number}-{row} " + chr(97 + row % 26) * row_bytes)[:row_bytes] for row in range(ROWS)]
        path = folder / f"shard_{number:05d}.parquet"
        parquet.write_table(pa.table({"text": rows}), path, compression="none", use_dictionary=False)
        paths.append(path)
    return paths


def overwrite_in_the_middle(path: Path) -> None:
    """As a disk that rots does: size and times stay."""
    seen = path.stat()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def publish_at(store: Store, name: str, paths: list[Path], origins: tuple[str, ...] = ()) -> Manifest:
    """Put the shards and a signed manifest there, as `publish --origin` does."""
    entries, files, torrents = [], {}, {}
    for number, path in enumerate(paths):
        hashed = hash_file(path)
        entries.append(
            ShardEntry(
                shard_id=ShardId(number),
                filename=path.name,
                size=hashed.size,
                content_id=hashed.content_id,
                kind="parquet",
                rows=ROWS,
            )
        )
        stat = path.stat()
        files[ContentId(hashed.content_id)] = SourceFile(path, stat.st_size, stat.st_mtime_ns)
        torrents[ContentId(hashed.content_id)] = b"d1:a" + hashed.piece_layer + b"e"
    manifest = Manifest(name=name, kind="dataset", shards=tuple(entries))
    signed = sign_manifest(manifest, SigningKey.generate(), origins)

    async def send() -> None:
        await publish(store.backing, signed, await missing_at(store.backing, manifest), files, torrents)

    loop_thread().run(asyncio.wait_for(send(), 30))
    return manifest


def file_at_whose_footer_pyarrow_aborts(path: Path) -> Path:
    """Three rows. An element is required (parquet-format, SchemaElement), and its statistics are of one that may be
    missing: asked where that column chunk is, pyarrow 26 ends the process.
    """
    parquet.write_table(pa.table({"id": [1, 2, 3], "tags": [[1, 2], [3], []]}), path)
    raw, element = path.read_bytes(), b"\x25\x02\x18\x07element"
    assert raw.count(element) == 1
    path.write_bytes(raw.replace(element, b"\x25\x00\x18\x07element"))
    return path
