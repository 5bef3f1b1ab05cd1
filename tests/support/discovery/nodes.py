"""What the discovery tests share: nodes on loopback, manifests, and killing a node without a goodbye."""

from __future__ import annotations

import hashlib
from contextlib import AbstractAsyncContextManager
from typing import Any

from node.discovery import Discovery, DiscoverySettings
from protocol.ids import ContentId
from protocol.manifest import Manifest, ShardEntry, SignedManifest, sign_manifest
from protocol.records import NodeInfo, Provider, RecordKey, manifest_key, pack_value, seal
from protocol.signing import SigningKey
from tests.support.clocks import MovedClock
from tests.support.waiting import eventually

HOST = "127.0.0.1"
CLUSTER = "reef"


def settings(*bootstrap: Discovery | tuple[str, int], cluster: str = CLUSTER, **others: Any) -> DiscoverySettings:
    addresses = tuple((HOST, b.port) if isinstance(b, Discovery) else b for b in bootstrap)
    # Shorter than the default, since many tests wait for peers that are gone.
    others = {"rpc_timeout_s": 0.3} | others
    return DiscoverySettings(cluster=cluster, advertise_host=HOST, bootstrap=addresses, **others)


def opened(*bootstrap: Discovery | tuple[str, int], **others: Any) -> AbstractAsyncContextManager[Discovery]:
    key = others.pop("key", None) or SigningKey.generate()
    times = {name: others.pop(name) for name in ("clock", "wall_clock") if name in others}
    return Discovery.open(settings(*bootstrap, **others), key, **times)


async def pass_time(clock: MovedClock, seconds: float, *nodes: Discovery) -> None:
    """Move the clock in steps; after each wait until these nodes have pushed what is due."""
    for _ in range(round(seconds * 4)):
        await clock.move(0.25)
        await eventually(lambda: not any(own.pushing.locked() for n in nodes for own in n._publisher._own.values()))


def kill(node: Discovery) -> None:
    """The socket is gone from one moment to the next: nothing is withdrawn, nothing is answered."""
    node._protocol.transport.abort()


def a_manifest(name: str = "corpus", shards: int = 3, kind: str = "dataset", salt: str = "") -> SignedManifest:
    entries = tuple(
        ShardEntry(
            shard_id=i,
            filename=f"{name}-{i}.bin" if kind != "file" else name,
            size=100 + i,
            content_id=ContentId(hashlib.sha256(f"{name}{salt}{i}".encode()).hexdigest()),
            kind="file",
        )
        for i in range(shards)
    )
    return sign_manifest(Manifest(name=name, kind=kind, shards=entries), SigningKey.generate())


def node_info(node: Discovery, cores: int = 4) -> NodeInfo:
    return NodeInfo(HOST, 7400, node.port, 7402, 1 << 30, cores)


async def announce(node: Discovery, signed: SignedManifest, *on_disk: int, loaded: tuple[int, ...] = ()) -> None:
    await node.announce_shards(signed, frozenset(on_disk), frozenset(loaded), rpc_port=7400, bt_port=7402)


def provider_value(
    signed: SignedManifest, key: SigningKey | None = None, *, cluster: str = CLUSTER, **others: Any
) -> tuple[RecordKey, bytes]:
    """A key and a value of one provider record, as a publisher would send it."""
    record_key = manifest_key(cluster, signed.digest)
    provider = Provider(HOST, 7400, 7402, b"\xe0", b"")
    return record_key, pack_value([seal(record_key, provider, key or SigningKey.generate(), **{"ttl_s": 60} | others)])
