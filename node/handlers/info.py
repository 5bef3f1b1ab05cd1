"""STATUS, NODES and CANCEL: what this node is doing, and whom it knows."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from node.background import Background
from node.discovery import Discovery
from node.machine import available_memory_bytes, process_memory_bytes, total_memory_bytes, usable_cores
from node.origin.registry import OriginRegistry
from node.pipeline.stage.stages import Stages
from node.rpc import RpcServer
from node.shards.service import Shards
from node.swarm import Swarm
from protocol.commands.nodes import (
    CancelParams,
    CancelResult,
    DhtStatus,
    LeaseStatus,
    NodeEntry,
    NodesResult,
    OriginStatus,
    StatusResult,
    SwarmStatus,
)
from protocol.ids import NodeId
from protocol.records import NodeInfo

_PACKAGES = ("shoal", "libtorrent", "kademlia", "tensor_iroh", "xllamacpp", "msgpack")


@dataclass(frozen=True)
class NodeParts:
    """The parts of a node whose figures STATUS shows."""

    swarm: Swarm
    discovery: Discovery
    origins: OriginRegistry
    shards: Shards
    stages: Stages


@dataclass(frozen=True)
class InfoHandlers:
    """Answers from what the parts know already; nothing here waits long."""

    node_id: NodeId
    cluster: str
    threads: int
    """Of an engine process."""
    here: NodeInfo
    parts: NodeParts
    server: RpcServer
    background: Background
    started: float = field(default_factory=time.monotonic)

    async def status(self) -> StatusResult:
        """STATUS, and what /metrics shows."""
        stages, transport = await self.parts.stages.status()
        swarm, dht, origin = self.parts.swarm.stats(), self.parts.discovery.stats(), self.parts.origins.stats()
        return StatusResult(
            node_id=self.node_id,
            cluster=self.cluster,
            uptime_s=time.monotonic() - self.started,
            versions=_versions(),
            memory={
                "total_bytes": total_memory_bytes(),
                "available_bytes": available_memory_bytes(),
                "process_bytes": process_memory_bytes(),
            },
            threads=self.threads,
            stages=stages,
            downloads=self.parts.shards.downloads(),
            swarm=SwarmStatus(
                uploaded_bytes=swarm.uploaded_bytes,
                downloaded_bytes=swarm.downloaded_bytes,
                peers=swarm.peers,
                torrents=swarm.torrents,
            ),
            dht=DhtStatus(nodes=dht.nodes, records=dht.records),
            transport=transport,
            origin=OriginStatus(
                urls=list(self.parts.origins.urls),
                downloaded_bytes=origin.downloaded_bytes,
                requests=origin.requests,
                errors=origin.errors,
            ),
            leases=[
                LeaseStatus(lease=one.lease, shards=one.shards, expires_in_s=one.expires_in_s)
                for one in self.parts.shards.leases.summaries(self.parts.shards.clock.now())
            ],
        )

    async def cancel(self, params: CancelParams) -> CancelResult:
        """CANCEL: a request in progress, or what goes on for one that did not want to wait."""
        waiting = self.server.cancel(params.request_id)
        going_on = self.background.cancel(params.request_id)
        return CancelResult(request_id=params.request_id, cancelled=waiting or going_on)

    async def nodes(self) -> NodesResult:
        """NODES: this one first, the others as the DHT knows them."""
        own = current_info(self.here)
        others = [found for found in await self.parts.discovery.list_nodes() if found.node_id != self.node_id]
        return NodesResult(
            nodes=[
                _entry(self.node_id, own, here=True),
                *(_entry(found.node_id, found.info, here=False) for found in others),
            ]
        )


def current_info(here: NodeInfo) -> NodeInfo:
    """Where this node is, with what it has left at this moment."""
    return NodeInfo(
        host=here.host,
        rpc_port=here.rpc_port,
        dht_port=here.dht_port,
        bt_port=here.bt_port,
        memory_available_bytes=available_memory_bytes(),
        cores=usable_cores(),
    )


def _entry(node_id: NodeId, info: NodeInfo, *, here: bool) -> NodeEntry:
    return NodeEntry(
        node_id=node_id,
        host=info.host,
        rpc_port=info.rpc_port,
        dht_port=info.dht_port,
        bt_port=info.bt_port,
        memory_available_bytes=info.memory_available_bytes,
        cores=info.cores,
        here=here,
    )


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
