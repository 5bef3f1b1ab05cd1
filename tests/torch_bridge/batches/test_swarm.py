"""StreamingBatchDataset over the shards of a published data set, without a node."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from node.origin.layout import encode_manifest, manifest_key, shard_key
from protocol.content import hash_file
from protocol.errors import ShardNotFoundError, ShoalError
from protocol.manifest import Manifest, ShardEntry, sign_manifest
from protocol.signing import SigningKey
from tests.support.bridge.batches import bodies, bytes_under, dataset, folder_of, name_and_body, sampled
from torch_bridge import O3Client
from torch_bridge.batches.sources.swarm import SwarmFiles
from torch_bridge.shards.sources.origin import OriginSource

CAPTIONS = json.dumps({f"{number:03d}": f"clip {number}" for number in range(9)}).encode()
FILES = {key.rpartition("/")[2]: body for key, body in bodies(9).items()}


def published(folder: Path) -> tuple[str, dict[str, str]]:
    """A data set at an origin of the kind file://: its URL, and the key of each shard."""
    loose = folder / "loose"
    folder_of(loose, FILES | {"captions.json": CAPTIONS})
    entries, keys = [], {}
    for number, path in enumerate(sorted(loose.iterdir())):
        hashed = hash_file(path)
        keys[path.name] = shard_key(hashed.content_id)
        entries.append(
            ShardEntry(shard_id=number, filename=path.name, size=hashed.size, content_id=hashed.content_id, kind="file")
        )
    manifest = Manifest(name="clips", kind="dataset", shards=tuple(entries))
    signed = sign_manifest(manifest, SigningKey.load_or_create(folder / "publisher.key"))
    url = (folder / "origin").as_uri()
    store = O3Client().at(url)
    for name, key in keys.items():
        store.put(key, loose / name)
    store.put(manifest_key("clips", signed.digest, 1_700_000_000_000), encode_manifest(signed, 0))
    return url, keys


def test_shards_are_fetched_once_used_and_discarded(tmp_path: Path) -> None:
    url, _ = published(tmp_path)
    source = SwarmFiles(OriginSource(url, tmp_path / "here", dataset="clips"))
    files = dataset(source, tmp_path / "cache", decode=name_and_body, cache_size=2, metadata="captions.json")
    with sampled(tmp_path / "here", bytes_under) as sizes:
        found = list(files)
    assert {name: body for name, body, _ in found} == FILES
    assert all(meta == f"clip {int(name[:3])}" for name, _, meta in found)
    assert 0 < max(size for size, _ in sizes) <= 4 * 40_000 + 10_000
    assert not list((tmp_path / "here").glob("*.bin"))
    assert files.report().downloaded_bytes == sum(map(len, FILES.values()))


def test_a_shard_that_is_wrong_or_unknown_is_an_error(tmp_path: Path) -> None:
    url, keys = published(tmp_path)
    path = tmp_path / "origin" / keys["004.bin"]
    path.write_bytes(FILES["004.bin"][::-1])
    source = SwarmFiles(OriginSource(url, tmp_path / "here", dataset="clips"))
    with pytest.raises(ShoalError, match=r"004\.bin|" + keys["004.bin"]):
        list(dataset(source, tmp_path / "cache"))
    with pytest.raises(ShardNotFoundError, match="no shard"):
        source.read("other.json")
