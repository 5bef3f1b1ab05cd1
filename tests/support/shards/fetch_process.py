"""A node that fetches one shard, as a process that a test can kill: FOLDER DHT_PORT SIGNED_MANIFEST SHARD_ID."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec

from node.discovery import Discovery, DiscoverySettings
from node.shards.service import Shards
from node.shards.settings import ShardsSettings
from node.swarm import Swarm, SwarmSettings
from protocol.manifest import manifest_from_wire
from protocol.signing import SigningKey


async def main(folder: Path, dht_port: int, manifest: Path, shard_id: int) -> None:
    signed = manifest_from_wire(msgspec.json.decode(manifest.read_bytes()))
    folder.mkdir(exist_ok=True)
    key = SigningKey.load_or_create(folder / "node.key")

    async def no_manifest(provider: Any, digest: Any) -> Any:
        raise AssertionError("it was given")

    discovery_settings = DiscoverySettings(
        cluster="test", advertise_host="127.0.0.1", bootstrap=(("127.0.0.1", dht_port),)
    )
    settings = ShardsSettings(shards_dir=folder / "shards", data_dir=folder / "data")
    async with (
        Swarm.open(SwarmSettings(state_dir=folder / "swarm")) as swarm,
        Discovery.open(discovery_settings, key) as discovery,
        Shards.open(
            settings, swarm=swarm, discovery=discovery, fetch_manifest=no_manifest, key=key, rpc_port=1
        ) as shards,
    ):
        await shards.fetch(signed.shard(shard_id), lambda progress: print(progress.bytes_done, flush=True))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
