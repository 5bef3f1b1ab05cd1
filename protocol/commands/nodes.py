"""STATUS, NODES, CANCEL."""

from __future__ import annotations

import msgspec

from protocol.commands.common import Params, RequestId, Result
from protocol.ids import ContentId, ManifestDigest, NodeId


class CancelParams(Params, frozen=True, kw_only=True):
    """CANCEL: end a request that is in progress on this node."""

    request_id: RequestId


class CancelResult(Result, frozen=True, kw_only=True):
    """Answer of CANCEL."""

    request_id: str
    cancelled: bool
    """False if no such request is in progress (any more)."""


class NodesParams(Params, frozen=True, kw_only=True):
    """NODES: the nodes of the cluster that this one knows."""


class NodeEntry(Result, frozen=True, kw_only=True):
    """One node of the cluster."""

    node_id: NodeId
    host: str
    rpc_port: int
    dht_port: int
    bt_port: int
    memory_available_bytes: int
    cores: int
    here: bool
    """Whether it is the node that answers."""


class NodesResult(Result, frozen=True, kw_only=True):
    """Answer of NODES."""

    nodes: list[NodeEntry]


class StatusParams(Params, frozen=True, kw_only=True):
    """STATUS."""


class StageStatus(Result, frozen=True, kw_only=True):
    """One engine process and the shards that it has loaded."""

    model: str
    digest: ManifestDigest
    shards: list[int]
    sessions: int
    pid: int
    memory_bytes: int
    """Resident, mapped shard pages included."""
    forwards: int
    """Batches that went through its shards."""
    forward_s: float
    """Seconds that they took, drawing of tokens included."""
    ticket: str
    """tensor_iroh address of its transport."""


class DownloadStatus(Result, frozen=True, kw_only=True):
    """One download in progress."""

    filename: str
    content_id: ContentId
    bytes_done: int
    bytes_total: int
    rate_bytes_s: float
    peers: int


class SwarmStatus(Result, frozen=True, kw_only=True):
    """BitTorrent, since the node's start."""

    uploaded_bytes: int
    """Payload."""
    downloaded_bytes: int
    peers: int
    torrents: int


class DhtStatus(Result, frozen=True, kw_only=True):
    """kademlia."""

    nodes: int
    """In the routing table."""
    records: int
    """Valid records kept for others and for ourselves."""


class TransportStatus(Result, frozen=True, kw_only=True):
    """Activations, over all stages of this node, since each stage's start."""

    sent_frames: int = 0
    sent_bytes: int = 0
    received_frames: int = 0
    received_bytes: int = 0
    dropped_frames: int = 0
    """Without the session's key, of an attempt that is over, or malformed."""
    peers: int = 0


class OriginStatus(Result, frozen=True, kw_only=True):
    """Object stores behind the swarm, since the node's start."""

    urls: list[str] = msgspec.field(default_factory=list)
    """The node's own, best first; manifests may name more. No credentials are in them."""
    downloaded_bytes: int = 0
    """Shards, manifests and torrent files."""
    requests: int = 0
    """What a store tried again by itself is not counted."""
    errors: int = 0
    """Requests that failed; a missing object does not count as a failure."""


class LeaseStatus(Result, frozen=True, kw_only=True):
    """One lease: a client's hold on shards."""

    lease: str
    shards: int
    """That it holds."""
    expires_in_s: float
    """Until the first of them is free, if it is not renewed."""


class StatusResult(Result, frozen=True, kw_only=True):
    """Answer of STATUS."""

    node_id: NodeId
    cluster: str
    uptime_s: float
    versions: dict[str, str]
    memory: dict[str, int]
    """`total_bytes`, `available_bytes`, `process_bytes`."""
    threads: int
    stages: list[StageStatus]
    downloads: list[DownloadStatus]
    swarm: SwarmStatus
    dht: DhtStatus
    transport: TransportStatus
    origin: OriginStatus = msgspec.field(default_factory=OriginStatus)
    leases: list[LeaseStatus] = msgspec.field(default_factory=list)
    """By name."""
