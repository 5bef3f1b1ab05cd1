"""Settings of this room, and the values that come out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from protocol.ids import ManifestDigest, NodeId
from protocol.records import MAX_TTL_S, NodeInfo

Address = tuple[str, int]
"""Host and UDP port."""

KSIZE = 20
"""How many nodes keep a record: k of the Kademlia paper, section 2.3."""
ALPHA = 10
"""Requests in flight in one walk; dead peers cost their timeout, so more than the paper's 3."""


@dataclass(frozen=True, slots=True)
class DiscoverySettings:
    """Where the DHT node listens and whom it joins. Raises ValueError for what cannot work."""

    cluster: str
    """Records of other clusters are never found, also where both share a DHT."""
    advertise_host: str
    """Host that our provider records name: where other nodes reach this one."""
    listen_host: str = "127.0.0.1"
    """IPv4 address to bind."""
    port: int = 0
    """UDP; 0 picks a free one."""
    bootstrap: tuple[Address, ...] = ()
    """Nodes to join through. They may come up later: they are tried again in the background."""
    record_ttl_s: int = 300
    """How long a record outlives its node. It is refreshed after a third of that."""
    rpc_timeout_s: float = 0.5
    """How long a peer may take to answer one datagram, its one repetition included."""

    def __post_init__(self) -> None:
        if not self.cluster:
            raise ValueError("the cluster has no name")
        if not 1 <= self.record_ttl_s <= MAX_TTL_S:
            raise ValueError(f"record_ttl_s is {self.record_ttl_s}: it must be 1 to {MAX_TTL_S}")
        if not 0.05 <= self.rpc_timeout_s <= 10:
            raise ValueError(f"rpc_timeout_s is {self.rpc_timeout_s}: it must be 0.05 to 10")
        for host, port in ((self.listen_host, self.port or 1), *self.bootstrap):
            if not host or not 1 <= port <= 65535:
                raise ValueError(f"{host!r}:{port} is no address to listen on or to join through")


@dataclass(frozen=True, slots=True)
class FoundProvider:
    """A node that has shards of a manifest."""

    node_id: NodeId
    host: str
    rpc_port: int
    bt_port: int
    on_disk: frozenset[int]
    """Ids of the shards whose bytes it has, checked."""
    loaded: frozenset[int]
    """Ids of the shards that a stage of it has loaded."""
    fetching: frozenset[int] = frozenset()
    """Ids of the shards that are on their way to it: it passes on the pieces that it has."""


@dataclass(frozen=True, slots=True)
class FoundName:
    """What a name means to some publishers; two of one name with different digests are an ambiguity."""

    name: str
    kind: Literal["model", "dataset", "file"]
    digest: ManifestDigest
    publishers: tuple[NodeId, ...]
    """Sorted."""


@dataclass(frozen=True, slots=True)
class FoundWant:
    """A node that takes its part of a shard's pieces from the origin at this moment."""

    node_id: NodeId
    host: str
    bt_port: int
    block_pieces: int = 0
    """How many adjacent pieces it shares out together."""


@dataclass(frozen=True, slots=True)
class FoundNode:
    """A node of the cluster, as it describes itself."""

    node_id: NodeId
    info: NodeInfo


@dataclass(frozen=True, slots=True)
class DhtStats:
    """What this node's part of the DHT holds."""

    nodes: int
    """Contacts in the routing table; without ourselves."""
    records: int
    """Valid records kept for others and for ourselves; without withdrawn ones."""
