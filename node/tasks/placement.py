"""Plans a model over the nodes of the cluster: which have its shards, which can load the rest; has them loaded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from node.background import FirstErrorGroup
from node.machine import available_memory_bytes
from node.pipeline.driver.plan import NodeShards, Plan, plan_pipeline
from node.tasks.registry import TaskContext
from protocol.client import Client
from protocol.commands.shards import LoadShardParams, ShardResult
from protocol.errors import (
    InsufficientMemoryError,
    NoSourceError,
    ShardNotLoadedError,
    ShoalError,
    TimedOutError,
    UnreachableError,
)
from protocol.ids import NodeId
from protocol.manifest import SignedManifest

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 3.0
MAX_LOAD_S = 3600.0
"""For one LOAD_SHARD, its download included."""


@dataclass
class Placement:
    """Plans for one model, and connections to the nodes of the plans."""

    context: TaskContext
    signed: SignedManifest
    auto_load: bool
    context_tokens: int
    on_progress: Callable[[dict[str, Any]], None]
    """Called with the PROGRESS of each load, as the loading node sends it."""
    load_s: float = 0.0
    """Seconds that planning and loading took so far."""
    _addresses: dict[NodeId, tuple[str, int]] = field(default_factory=dict)

    async def make_plan(self, without: frozenset[NodeId]) -> Plan:
        """A plan without some nodes; returns once every shard of it is loaded.

        A node that cannot be reached is left out of the next try; a node that fails to load a shard keeps the shards
        that it has and gets no more. Raises ShardNotLoadedError if a shard is not loaded and `auto_load` is false,
        NoSourceError if no peer has a shard, else the error of the last node, or of the planner if no node was asked.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        excluded, full = set(without), set[NodeId]()
        failure: ShoalError | None = None
        while True:
            nodes = [
                replace(one, memory_available_bytes=0) if one.node_id in full else one for one in await self._nodes()
            ]
            try:
                plan = plan_pipeline(self.signed.manifest, nodes, context_tokens=self.context_tokens, without=excluded)
            except (NoSourceError, InsufficientMemoryError):
                if failure is not None:
                    raise failure from None
                raise
            if plan.to_load and not self.auto_load:
                raise self._not_loaded(plan)
            failed = await self._load(plan)
            if not failed:
                self.load_s += loop.time() - started
                return plan
            for node_id, failure in failed.items():
                if isinstance(failure, NoSourceError):
                    raise failure
                (excluded if isinstance(failure, UnreachableError | TimedOutError) else full).add(node_id)

    @asynccontextmanager
    async def connect(self, node_id: NodeId) -> AsyncIterator[Client]:
        """A new connection to a node of the plan. Raises UnreachableError."""
        if node_id not in self._addresses:
            raise UnreachableError(f"the address of node {node_id} is unknown: it is in no plan of this generation")
        host, port = self._addresses[node_id]
        async with Client.connect(host, port, timeout_s=CONNECT_TIMEOUT_S) as client:
            yield client

    async def _nodes(self) -> list[NodeShards]:
        """This node, the providers of the model, and the other nodes that discovery knows."""
        context, digest = self.context, self.signed.digest
        providers, others = await asyncio.gather(
            context.discovery.find_providers(digest), context.discovery.list_nodes()
        )
        self._addresses[context.node_id] = context.rpc_address
        found = {
            context.node_id: NodeShards(
                context.node_id,
                context.shards.on_disk(digest),
                context.stages.loaded(digest),
                available_memory_bytes(),
            )
        }
        memory = {other.node_id: other.info.memory_available_bytes for other in others}
        for provider in providers:
            self._addresses[provider.node_id] = (provider.host, provider.rpc_port)
            found[provider.node_id] = NodeShards(
                provider.node_id, provider.on_disk, provider.loaded, memory.get(provider.node_id)
            )
        for other in others:
            if other.node_id not in found:
                self._addresses[other.node_id] = (other.info.host, other.info.rpc_port)
                found[other.node_id] = NodeShards(
                    other.node_id, memory_available_bytes=other.info.memory_available_bytes
                )
        return list(found.values())

    async def _load(self, plan: Plan) -> dict[NodeId, ShoalError]:
        """Load what is missing, on all nodes at once; returns the nodes that could not, with their errors."""
        failed: dict[NodeId, ShoalError] = {}

        async def load_on(node_id: NodeId, shard_ids: list[int]) -> None:
            try:
                async with self.connect(node_id) as client:
                    for shard_id in shard_ids:
                        params = LoadShardParams(
                            model=f"{self.signed.manifest.name}@{self.signed.digest}", shard_id=shard_id
                        )
                        await client.call(
                            "LOAD_SHARD",
                            params,
                            result_type=ShardResult,
                            recipient=node_id,
                            timeout_s=MAX_LOAD_S,
                            on_notification=lambda _, progress: self.on_progress(progress),
                        )
            except ShoalError as error:
                log.warning("node %s cannot load shards %s: %s", node_id[:16], shard_ids, error)
                failed[node_id] = error

        work: dict[NodeId, list[int]] = {}
        for missing in plan.to_load:
            work.setdefault(missing.node_id, []).append(missing.shard_id)
        async with FirstErrorGroup() as group:
            for node_id, shard_ids in work.items():
                group.create_task(load_on(node_id, shard_ids))
        return failed

    def _not_loaded(self, plan: Plan) -> ShardNotLoadedError:
        missing = sorted(one.shard_id for one in plan.to_load)
        name = self.signed.manifest.name
        return ShardNotLoadedError(
            f"no node has loaded shards {missing} of {name}; LOAD_SHARD them (for example on the nodes in "
            "details.plan), or ask with auto_load: true",
            {
                "model": name,
                "shards": missing,
                "plan": [{"node": one.node_id, "shard_id": one.shard_id} for one in plan.to_load],
            },
        )
