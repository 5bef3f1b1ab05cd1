"""The shards room of a node with the real rooms below it, and tiny models to put into it."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np

from node.discovery import Discovery, DiscoverySettings
from node.shards.interfaces import OriginCatalog
from node.shards.service import Shards
from node.shards.settings import ShardsSettings
from node.swarm import Swarm, SwarmSettings
from protocol.content import hash_file
from protocol.errors import UnreachableError
from protocol.manifest import Manifest, ModelInfo, ShardEntry, SignedManifest, manifest_from_wire
from protocol.signing import SigningKey
from tests.support.shards.parts import ThreadHasher

QUICK = {
    "settle_s": 0.2,
    "incomplete_s": 0.6,
    "rescan_s": 60.0,
    "find_timeout_s": 10.0,
    "relookup_s": 0.5,
    "restart_s": 5.0,
    "stall_timeout_s": 20.0,
    "origin_after_s": 0.3,
}

_RPC_PORTS = itertools.count(1024)
"""Names of nodes, where nobody listens: a free port that is not taken may be given to two of them."""


@dataclass(frozen=True)
class Node:
    shards: Shards
    swarm: Swarm
    discovery: Discovery
    rpc_port: int
    shards_dir: Path


Network = dict[int, Shards]
"""RPC port -> the room behind it: what the RPC server and client would do for GET_MANIFEST."""


@asynccontextmanager
async def open_node(
    folder: Path,
    network: Network,
    *,
    bootstrap: tuple[Node, ...] = (),
    upload_limit: int = 0,
    download_limit: int = 0,
    origin: OriginCatalog | None = None,
    **options: Any,
) -> AsyncIterator[Node]:
    """One node's rooms; opened again with the same folder it is the same node after a restart."""
    folder.mkdir(exist_ok=True)
    key = SigningKey.load_or_create(folder / "node.key")
    rpc_port = next(_RPC_PORTS)

    async def fetch_manifest(provider: Any, digest: Any) -> SignedManifest:
        shards = network.get(provider.rpc_port)
        signed = shards.manifest(digest) if shards else None
        if signed is None:
            raise UnreachableError(f"nobody at {provider.rpc_port}")
        return manifest_from_wire(msgspec.to_builtins(signed), digest)

    async with AsyncExitStack() as stack:
        swarm = await stack.enter_async_context(
            Swarm.open(
                SwarmSettings(
                    state_dir=folder / "swarm",
                    upload_limit_bytes_s=upload_limit,
                    download_limit_bytes_s=download_limit,
                )
            )
        )
        discovery = await stack.enter_async_context(
            Discovery.open(
                DiscoverySettings(
                    cluster="test",
                    advertise_host="127.0.0.1",
                    bootstrap=tuple(("127.0.0.1", node.discovery.port) for node in bootstrap),
                ),
                key,
            )
        )
        settings = ShardsSettings(shards_dir=folder / "shards", data_dir=folder / "data", **{**QUICK, **options})
        shards = await stack.enter_async_context(
            Shards.open(
                settings,
                swarm=swarm,
                discovery=discovery,
                fetch_manifest=fetch_manifest,
                key=key,
                rpc_port=rpc_port,
                origin=origin,
                new_hasher=ThreadHasher,
            )
        )
        network[rpc_port] = shards
        stack.callback(network.pop, rpc_port)
        yield Node(shards, swarm, discovery, rpc_port, settings.shards_dir)


def write_gguf(path: Path, size: int = 3_000_000) -> Path:
    """A valid GGUF with one random tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.frombuffer(os.urandom(size // 4 * 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(folder: Path, name: str = "tiny", n_shards: int = 2, size: int = 3_000_000) -> Manifest:
    """A model cut by hand: as many slices of one layer, and the manifest that `split` would write."""
    folder.mkdir(parents=True)
    entries = []
    for shard_id in range(n_shards):
        path = write_gguf(folder / f"shard-{shard_id}.gguf", size)
        content = hash_file(path)
        entries.append(
            ShardEntry(
                shard_id=shard_id,
                filename=path.name,
                size=content.size,
                content_id=content.content_id,
                kind="gguf",
                start_layer=shard_id,
                end_layer=shard_id + 1,
            )
        )
    model = ModelInfo(architecture="llama", n_layers=n_shards, n_embd=8, context_length=64)
    manifest = Manifest(name=name, kind="model", shards=tuple(entries), model=model)
    (folder / "manifest.json").write_bytes(msgspec.json.encode({"manifest": manifest}))
    return manifest
