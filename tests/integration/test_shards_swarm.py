"""Two nodes' shards rooms over the real swarm and the real DHT."""

from __future__ import annotations

from pathlib import Path

from shards_rooms import Network, open_node, write_model


async def test_a_shard_moves_from_one_node_to_another(tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "a" / "shards" / "tiny")
    network: Network = {}
    async with open_node(tmp_path / "a", network) as a, open_node(tmp_path / "b", network, bootstrap=(a,)) as b:
        await a.shards.settled()
        assert [(f.filename, f.state, f.model, f.shard_id) for f in a.shards.files()] == [
            ("tiny/shard-0.gguf", "seeding", "tiny", 0),
            ("tiny/shard-1.gguf", "seeding", "tiny", 1),
        ]
        signed = await b.shards.resolve("model", "tiny")
        assert signed.digest == manifest.digest
        phases = []
        fetched = await b.shards.fetch(signed, signed.manifest.shard(1), lambda p: phases.append(p.phase))
        assert fetched.source == "peers"
        assert fetched.bytes_by_source == {"peers": manifest.shards[1].size}
        assert fetched.path.read_bytes() == (a.shards_dir / "tiny" / "shard-1.gguf").read_bytes()
        assert fetched.path.parent.parent == b.shards_dir
        assert phases[0] == "finding"
        assert "downloading" in phases
        await b.shards.settled()
        assert [(f.state, f.shard_id) for f in b.shards.files()] == [("seeding", 1)]
        assert {f.info_hash for f in b.shards.files()} == {a.shards.files()[1].info_hash}
        again = await b.shards.fetch(signed, signed.manifest.shard(1))
        assert (again.source, again.path) == ("local", fetched.path)
