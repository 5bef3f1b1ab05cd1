"""STATUS, NODES and CANCEL: what this node is doing, and whom it knows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from node.discovery import Discovery
from node.machine import available_memory_bytes, process_memory_bytes, total_memory_bytes, usable_cores
from node.pipeline.stage import Stages
from node.rpc import Call, RpcServer
from node.shards import Shards
from node.swarm import Swarm
from protocol.commands.nodes import (
    CancelParams,
    CancelResult,
    DhtStatus,
    NodeEntry,
    NodesParams,
    NodesResult,
    StatusParams,
    StatusResult,
    SwarmStatus,
)
from protocol.ids import NodeId
from protocol.records import NodeInfo

_PACKAGES = ("shoal", "libtorrent", "kademlia", "tensor_iroh", "xllamacpp", "msgpack")


@dataclass(frozen=True)
class InfoHandlers:
    """Answers from what the parts know already; nothing here waits long."""

    node_id: NodeId
    cluster: str
    threads: int
    swarm: Swarm
    discovery: Discovery
    shards: Shards
    stages: Stages
    here: NodeInfo
    started: float = field(default_factory=time.monotonic)

    def snapshot(self) -> StatusResult:
        """What STATUS answers."""
        swarm, dht = self.swarm.stats(), self.discovery.stats()
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
            stages=self.stages.status(),
            downloads=self.shards.downloads(),
            swarm=SwarmStatus(
                uploaded_bytes=swarm.uploaded_bytes,
                downloaded_bytes=swarm.downloaded_bytes,
                peers=swarm.peers,
                torrents=swarm.torrents,
            ),
            dht=DhtStatus(nodes=dht.nodes, records=dht.records),
            transport=self.stages.transport_status(),
        )

    async def status(self, params: StatusParams, call: Call) -> StatusResult:
        """STATUS."""
        del params, call
        await self.stages.refresh()
        return self.snapshot()

    async def nodes(self, params: NodesParams, call: Call) -> NodesResult:
        """NODES: this one first, the others as the DHT knows them."""
        del params, call
        own = current_info(self.here)
        entries = [_entry(self.node_id, own, here=True)]
        for found in await self.discovery.list_nodes():
            if found.node_id != self.node_id:
                entries.append(_entry(found.node_id, found.info, here=False))
        return NodesResult(nodes=entries)


def cancel_handler(server: RpcServer) -> object:
    """CANCEL, by the server that knows every request in progress."""

    async def cancel(params: CancelParams, call: Call) -> CancelResult:
        del call
        return CancelResult(request_id=params.request_id, cancelled=server.cancel(params.request_id))

    return cancel


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


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
