"""Nodes' shards rooms over the real swarm and the real DHT."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protocol.commands.common import ShardSelector
from protocol.errors import InsufficientDiskError, NoSourceError, ShardNotFoundError
from protocol.manifest import Shard, SignedManifest
from tests.support.shards.rooms import Network, Node, open_node, write_gguf, write_model
from tests.support.waiting import eventually


def states(node: Node) -> dict[str, str]:
    return {info.filename: info.state for info in node.shards.files()}


async def test_a_shard_moves_is_evicted_and_moves_again(tmp_path: Path) -> None:
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
        entry = signed.manifest.shard(1)
        phases: list[str] = []
        fetched = await b.shards.fetch(Shard(signed, entry), lambda progress: phases.append(progress.phase))
        assert fetched.source == "peers"
        assert fetched.bytes_by_source == {"peers": entry.size}
        assert fetched.path.read_bytes() == (a.shards_dir / "tiny" / "shard-1.gguf").read_bytes()
        assert fetched.path.parent.parent == b.shards_dir
        assert phases[0] == "finding"
        assert "downloading" in phases
        await b.shards.settled()
        assert [(f.state, f.shard_id) for f in b.shards.files()] == [("seeding", 1)]
        assert {f.info_hash for f in b.shards.files()} == {a.shards.files()[1].info_hash}
        again = await b.shards.fetch(Shard(signed, entry))
        assert (again.source, again.path) == ("local", fetched.path)
        (provider,) = await a.discovery.find_providers(signed.digest)
        assert provider.on_disk == {1}

        await b.shards.evict(Shard(signed, entry))
        await b.shards.settled()
        assert (states(b), fetched.path.exists()) == ({}, False)
        assert await a.discovery.find_providers(signed.digest) == []
        assert (await b.shards.fetch(Shard(signed, entry))).source == "peers"
        assert fetched.path.read_bytes() == (a.shards_dir / "tiny" / "shard-1.gguf").read_bytes()


async def test_after_a_restart_nothing_is_hashed_again_and_a_fetched_shard_serves_others(tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "a" / "shards" / "tiny")
    network: Network = {}
    async with open_node(tmp_path / "a", network) as a, open_node(tmp_path / "b", network, bootstrap=(a,)) as b:
        await a.shards.settled()
        assert a.shards.hashed_bytes == manifest.total_bytes
        signed = await b.shards.resolve("model", None)
        await asyncio.gather(*(b.shards.fetch(Shard(signed, entry)) for entry in signed.manifest.shards))
        await b.shards.settled()
    # Node a is gone; b comes back alone, and c gets everything from it.
    async with open_node(tmp_path / "b", network) as b, open_node(tmp_path / "c", network, bootstrap=(b,)) as c:
        await b.shards.settled()
        assert b.shards.hashed_bytes == 0
        assert sorted(states(b).values()) == ["seeding", "seeding"]
        signed = await c.shards.resolve("model", "tiny")
        assert signed.digest == manifest.digest
        for entry in signed.manifest.shards:
            fetched = await c.shards.fetch(Shard(signed, entry))
            assert fetched.source == "peers"
            assert fetched.path.read_bytes() == (tmp_path / "a/shards/tiny" / entry.filename).read_bytes()


async def test_a_file_dropped_in_is_found_by_its_name_and_a_damaged_one_never(tmp_path: Path) -> None:
    network: Network = {}
    async with open_node(tmp_path / "a", network) as a, open_node(tmp_path / "b", network, bootstrap=(a,)) as b:
        await a.shards.settled()
        pq.write_table(pa.table({"x": list(range(50_000))}), a.shards_dir / "rows.parquet")
        write_gguf(tmp_path / "whole.gguf")
        (a.shards_dir / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:-1000])
        await eventually(lambda: states(a) == {"rows.parquet": "seeding", "cut.gguf": "invalid"})
        await a.shards.settled()
        shard = await b.shards.select(ShardSelector(filename="rows.parquet"))
        fetched = await b.shards.fetch(shard)
        assert fetched.path.read_bytes() == (a.shards_dir / "rows.parquet").read_bytes()
        assert fetched.path.parent.name == f"rows.parquet@{shard.digest[:12]}"
        with pytest.raises(ShardNotFoundError):
            await b.shards.select(ShardSelector(filename="cut.gguf"))
        (a.shards_dir / "rows.parquet").unlink()
        await eventually(lambda: states(a) == {"cut.gguf": "invalid"})


async def test_three_fetch_at_once_and_one_of_two_callers_leaves(tmp_path: Path) -> None:
    write_model(tmp_path / "a" / "shards" / "tiny", n_shards=1, size=4_000_000)
    network: Network = {}
    async with (
        open_node(tmp_path / "a", network, upload_limit=4_000_000) as a,
        open_node(tmp_path / "b", network, bootstrap=(a,)) as b,
        open_node(tmp_path / "c", network, bootstrap=(a,)) as c,
        open_node(tmp_path / "d", network, bootstrap=(a,)) as d,
    ):
        await a.shards.settled()
        signed = await b.shards.resolve("model", "tiny")
        entry = signed.manifest.shard(0)
        async with asyncio.TaskGroup() as tasks:
            fetches = [tasks.create_task(node.shards.fetch(Shard(signed, entry))) for node in (b, c, d)]
            leaver = asyncio.create_task(b.shards.fetch(Shard(signed, entry)))
            await eventually(lambda: bool(b.shards.downloads()) and b.shards.downloads()[0].bytes_done > 0)
            assert len(b.shards.downloads()) == 1
            leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        for fetch in fetches:
            assert fetch.result().path.read_bytes() == (a.shards_dir / "tiny/shard-0.gguf").read_bytes()


async def test_a_downloader_killed_in_the_middle_goes_on(tmp_path: Path) -> None:
    size = 32_000_000
    write_model(tmp_path / "a" / "shards" / "tiny", n_shards=1, size=size)
    network: Network = {}
    async with open_node(tmp_path / "a", network, upload_limit=12_000_000) as a:
        await a.shards.settled()
        (signed,) = a.shards.manifests()
        (tmp_path / "signed.json").write_bytes(msgspec.json.encode(signed))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.support.shards.fetch_process",
            *map(str, (tmp_path / "b", a.discovery.port, tmp_path / "signed.json", 0)),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert process.stdout is not None
        try:
            killed_at = 0
            while killed_at < size * 3 // 4:
                killed_at = int(await process.stdout.readline())
        finally:
            process.send_signal(signal.SIGKILL)
            await process.stdout.read()
            await process.wait()
        part = next((tmp_path / "b" / "shards").rglob("*.part"))
        async with open_node(tmp_path / "b", network, bootstrap=(a,)) as b:
            await b.shards.settled()
            assert states(b) == {}
            assert [held.digest for held in b.shards.manifests()] == [signed.digest]
            fetched = await b.shards.fetch(signed.shard(0))
            assert fetched.path == part.with_suffix("")
            assert fetched.path.read_bytes() == (a.shards_dir / "tiny/shard-0.gguf").read_bytes()
            moved_twice = killed_at + fetched.bytes_by_source["peers"] - size
            assert moved_twice <= 16 << 20


async def test_without_space_or_source_the_error_says_so_and_nothing_is_left(tmp_path: Path) -> None:
    write_model(tmp_path / "a" / "shards" / "tiny", n_shards=1)
    network: Network = {}
    async with (
        open_node(tmp_path / "a", network) as a,
        open_node(tmp_path / "b", network, bootstrap=(a,), min_free_disk=1 << 60) as b,
        open_node(tmp_path / "c", network, bootstrap=(a,), find_timeout_s=1.0) as c,
    ):
        await a.shards.settled()
        signed = await b.shards.resolve("model", "tiny")
        entry = signed.manifest.shard(0)
        with pytest.raises(InsufficientDiskError) as caught:
            await b.shards.fetch(Shard(signed, entry))
        assert caught.value.details["needed"] == entry.size
        await a.shards.evict(Shard(signed, entry))
        await a.shards.settled()
        with pytest.raises(NoSourceError, match=r"shard-0\.gguf"):
            await c.shards.fetch(Shard(signed, entry))
        for node in (b, c):
            assert (states(node), list(node.shards_dir.iterdir())) == ({}, [])


async def test_a_seed_whose_file_was_changed_is_noticed_and_withdrawn(tmp_path: Path) -> None:
    write_model(tmp_path / "a" / "shards" / "tiny", n_shards=1)
    network: Network = {}
    async with (
        open_node(tmp_path / "a", network) as a,
        open_node(tmp_path / "b", network, bootstrap=(a,), restart_s=1.0, stall_timeout_s=2.0) as b,
    ):
        await a.shards.settled()
        path = a.shards_dir / "tiny" / "shard-0.gguf"
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(1_000_000)
            file.write(os.urandom(1000))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        signed: SignedManifest = await b.shards.resolve("model", "tiny")
        fetch = asyncio.create_task(b.shards.fetch(signed.shard(0)))
        await eventually(lambda: states(a) == {"tiny/shard-0.gguf": "invalid"})
        with pytest.raises(NoSourceError):
            await fetch
        await a.shards.settled()
        assert await b.discovery.find_providers(signed.digest) == []
        assert "not what was hashed" in (a.shards.files()[0].error or "")
        assert states(b) == {}
