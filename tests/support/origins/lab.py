"""Nodes' rooms with an origin behind the fault-injecting proxy, and a shard that lies there."""

from __future__ import annotations

import asyncio
import io
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from node.cli.demo.s3_server import S3Server, running_s3
from node.discovery import Discovery, DiscoverySettings
from node.origin.layout import encode_manifest, manifest_key, shard_key, torrent_key
from node.origin.registry import OriginRegistry
from node.origin.settings import OriginSettings
from node.shards.service import Shards
from node.shards.settings import ShardsSettings
from node.shards.store.catalog import torrent_of
from node.swarm import Swarm, SwarmSettings, Torrent
from protocol.content import hash_file
from protocol.errors import UnreachableError
from protocol.manifest import Manifest, ShardEntry, SignedManifest, sign_manifest
from protocol.signing import SigningKey
from tests.support.daemons import Daemon, daemon
from tests.support.origins.presigned import presigned_url
from tests.support.origins.proxy import OriginProxy
from tests.support.shards.parts import ThreadHasher
from tests.support.shards.rooms import QUICK, Node

__all__ = ["ONE", "TWO", "Daemon", "Stock", "daemon", "open_node", "payload_reaches", "stocked"]

SIZE = 8_000_005
"""30 pieces and a part of one, in eight blocks of what a node takes from an origin with one request."""
PATIENCE = {**QUICK, "origin_after_s": 0.3, "find_timeout_s": 1.0, "stall_timeout_s": 8.0}
ONE, TWO = "s3://shards/one", "s3://shards/two"
"""Two origins with the same objects."""

_RPC_PORTS = itertools.count(1024)
"""Names of nodes, where nobody listens: a free port that is not taken may be given to two of them."""


@dataclass(frozen=True)
class Stock:
    """What lies at the origins."""

    s3: S3Server
    signed: SignedManifest
    path: Path
    """The shard's own file, to compare with."""
    torrent: Torrent

    @property
    def entry(self) -> ShardEntry:
        return self.signed.manifest.shard(0)

    @property
    def key(self) -> str:
        """In the key of the shard's bytes at both origins, and in no other."""
        return shard_key(self.entry.content_id)

    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.s3.access_key, "AWS_SECRET_ACCESS_KEY": self.s3.secret_key}

    @asynccontextmanager
    async def proxy(self, rate_bytes_s: float = 0) -> AsyncIterator[OriginProxy]:
        keys = self.s3.access_key, self.s3.secret_key
        async with OriginProxy.running(self.s3.endpoint, keys=keys, rate_bytes_s=rate_bytes_s) as proxy:
            yield proxy


@asynccontextmanager
async def stocked(folder: Path, size: int = SIZE) -> AsyncIterator[Stock]:
    """A server with a data set of one shard, under two prefixes."""
    path = folder / "shard.bin"
    path.write_bytes(random.Random(size).randbytes(size))
    hashed = hash_file(path)
    entry = ShardEntry(shard_id=0, filename="shard.bin", size=size, content_id=hashed.content_id, kind="file")
    manifest = Manifest(name="lab", kind="dataset", shards=(entry,))
    signed = sign_manifest(manifest, SigningKey.load_or_create(folder / "publisher.key"))
    torrent = torrent_of(entry)
    objects = {
        shard_key(hashed.content_id): path.read_bytes(),
        torrent_key(hashed.content_id): torrent.metainfo(hashed.piece_layer),
        manifest_key("lab", signed.digest, 1_700_000_000_000): encode_manifest(signed, 0),
    }
    async with running_s3(folder / "s3") as s3, aiohttp.ClientSession() as session:
        for prefix in (ONE, TWO):
            for key, body in objects.items():
                at = f"{prefix.removeprefix('s3://')}/{key}"
                url = presigned_url(s3.endpoint, at, s3.access_key, s3.secret_key, method="PUT")
                async with session.put(url, data=io.BytesIO(body)) as answer:
                    assert answer.status == 200, await answer.text()
        yield Stock(s3, signed, path, torrent)


@asynccontextmanager
async def open_node(
    folder: Path,
    stock: Stock,
    proxy: OriginProxy,
    *,
    origins: tuple[str, ...] = (ONE,),
    bootstrap: tuple[Node, ...] = (),
    dht_ports: tuple[int, ...] = (),
    **options: Any,
) -> AsyncIterator[Node]:
    """One node's rooms, with the origin as its last resort. `options` are fields of ShardsSettings."""
    folder.mkdir(exist_ok=True)
    key = SigningKey.load_or_create(folder / "node.key")
    rpc_port = next(_RPC_PORTS)

    async def no_manifest(provider: Any, digest: Any) -> SignedManifest:
        raise UnreachableError("every test gives its manifest")

    dht = tuple(("127.0.0.1", port) for port in (*(node.discovery.port for node in bootstrap), *dht_ports))
    async with AsyncExitStack() as stack:
        given = OriginSettings.from_environment(
            stock.environment(),
            origins=origins,
            s3_endpoint=proxy.endpoint,
            connect_timeout_s=2.0,
            read_timeout_s=2.0,
            retry_total_s=0.8,  # below half of the shortest stall_timeout_s here
        )
        origin = await stack.enter_async_context(OriginRegistry.open(given))
        swarm = await stack.enter_async_context(Swarm.open(SwarmSettings(state_dir=folder / "swarm")))
        discovery = await stack.enter_async_context(
            Discovery.open(DiscoverySettings(cluster="test", advertise_host="127.0.0.1", bootstrap=dht), key)
        )
        settings = ShardsSettings(shards_dir=folder / "shards", data_dir=folder / "data", **{**PATIENCE, **options})
        shards = await stack.enter_async_context(
            Shards.open(
                settings,
                swarm=swarm,
                discovery=discovery,
                fetch_manifest=no_manifest,
                key=key,
                rpc_port=rpc_port,
                origin=origin,
                new_hasher=ThreadHasher,
            )
        )
        yield Node(shards, swarm, discovery, rpc_port, settings.shards_dir)


async def payload_reaches(proxy: OriginProxy, key: str, size: int, timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while proxy.ledger.payload_bytes(key) < size:  # noqa: ASYNC110 - what is waited for happens on a socket
            await asyncio.sleep(0.02)
