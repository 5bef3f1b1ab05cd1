"""Shards through a real node, from a real peer."""

from __future__ import annotations

from pathlib import Path

from tests.integration.daemons import daemon, shoal, wait_until
from tests.torch_bridge.shards_parts import parquet_files
from torch_bridge.shards.downloader import StreamingDownloader
from torch_bridge.shards.opening import open_source


def test_an_epoch_streams_through_the_node(tmp_path: Path) -> None:
    home = tmp_path / "seed"
    parquet_files(home / "set", 3)
    assert shoal("publish", str(home / "set"), "--name", "org/set", "--data-dir", str(home)).returncode == 0
    with daemon(home) as seed, daemon(tmp_path / "trainer", bootstrap=seed) as node:
        wait_until(lambda: [file["state"] for file in seed.files().values()] == ["seeding"] * 3)
        source = open_source(f"127.0.0.1:{node.ports['rpc']}", "org/set", folder=tmp_path / "ledger")
        entries = source.manifest().shards
        with StreamingDownloader(source, buffer_size=1, max_buffer=1, stop_free_bytes=0) as shards:
            for entry in entries:
                assert shards.wait_for_shard(entry, 30).stat().st_size == entry.size
                shards.consumed(entry)
            assert shards.status().deleted == 3
            assert shards.status().bytes_by_source == {"peers": sum(entry.size for entry in entries)}
        assert node.files() == {}
        source.close()
