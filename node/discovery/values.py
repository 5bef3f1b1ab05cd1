"""Settings of discovery, and the values that lookups return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from protocol.ids import ManifestDigest, NodeId
from protocol.records import MAX_TTL_S, NodeInfo

UdpAddress = tuple[str, int]
"""Host and UDP port."""

KSIZE = 20
"""How many nodes keep a record: k of the Kademlia paper, section 2.3."""
ALPHA = 10
"""Requests in flight in one walk; dead peers cost their timeout, so more than the paper's 3."""


@dataclass(frozen=True, slots=True)
class DiscoverySettings:
    """The DHT node's addresses, peers and times. Raises ValueError for a value out of range."""

    cluster: str
    """Records of other clusters are never found, even if both share a DHT."""
    advertise_host: str
    """Host in this node's provider records: other nodes reach it there."""
    listen_host: str = "127.0.0.1"
    """IPv4 address to bind."""
    port: int = 0
    """UDP; 0 picks a free one."""
    bootstrap: tuple[UdpAddress, ...] = ()
    """Nodes to join through. They may come up later: joining is repeated in the background."""
    record_ttl_s: int = 300
    """How long a record outlives its node. It is refreshed after a third of that."""
    rpc_timeout_s: float = 0.5
    """How long a peer may take to answer one datagram, its one repetition included."""
    walk_deadline_s: float = 4.0
    """How long one lookup may take; then what was found counts."""
    upkeep_s: float = 30.0
    """Between walks towards the own id, which find new neighbours and drop dead ones."""
    retry_s: float = 0.5
    """After a failed attempt to join; each further one waits 1.5 times as long, up to 10 s."""
    withdraw_timeout_s: float = 2.0
    """How long leaving may take: what is not withdrawn by then expires by itself."""

    def __post_init__(self) -> None:
        if not self.cluster:
            raise ValueError("cluster is empty: it must be a name")
        if not 1 <= self.record_ttl_s <= MAX_TTL_S:
            raise ValueError(f"record_ttl_s is {self.record_ttl_s}: it must be 1 to {MAX_TTL_S}")
        if not 0.05 <= self.rpc_timeout_s <= 10:
            raise ValueError(f"rpc_timeout_s is {self.rpc_timeout_s}: it must be 0.05 to 10")
        for name in ("walk_deadline_s", "upkeep_s", "retry_s", "withdraw_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: it must be above 0")
        for host, port in ((self.listen_host, self.port or 1), *self.bootstrap):
            if not host or not 1 <= port <= 65535:
                raise ValueError(f"{host!r}:{port} is not an address: it needs a host and a port of 1 to 65535")


@dataclass(frozen=True, slots=True)
class ProviderInfo:
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
class NameInfo:
    """What a name stands for by some publishers; two of one name with different digests are an ambiguity."""

    name: str
    kind: Literal["model", "dataset", "file"]
    digest: ManifestDigest
    publishers: tuple[NodeId, ...]
    """Sorted."""


@dataclass(frozen=True, slots=True)
class WantInfo:
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
    """Contacts in the routing table, without this node."""
    records: int
    """Valid records, this node's own included; without withdrawn ones."""
