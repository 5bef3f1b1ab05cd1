"""A data set of two files, and the discovery of a cluster in which it is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.manifest import SignedManifest
from tests.support.shards.parts import MemoryDiscovery, manifest_of, write_shard


@pytest.fixture
def made(tmp_path: Path) -> Path:
    for name in ("a.parquet", "b.bin"):
        write_shard(tmp_path / "made" / name)
    return tmp_path / "made"


@pytest.fixture
def cluster() -> MemoryDiscovery:
    return MemoryDiscovery()


@pytest.fixture
def signed(made: Path, cluster: MemoryDiscovery) -> SignedManifest:
    return cluster.publish(manifest_of(made, "a.parquet", "b.bin", name="owner/set"))
