"""Which node runs which shard of a model: a pure function.

A shard runs on a node that has it loaded, else on one that has it on disk; the missing shards are spread evenly over
the nodes. Neighbouring shards of one node become one stage, so that fewer activations are sent. The same input gives
the same plan, whatever the order of the nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protocol.errors import InsufficientMemoryError, InvalidParamsError, NoSourceError
from protocol.ids import NodeId
from protocol.manifest import Manifest, ShardEntry


@dataclass(frozen=True)
class NodeShards:
    """What the planner knows of one node."""

    node_id: NodeId
    on_disk: frozenset[int] = frozenset()
    loaded: frozenset[int] = frozenset()
    memory_available_bytes: int | None = None
    """For shards that are not loaded yet; None: unknown, and taken as unlimited."""


@dataclass(frozen=True)
class PlannedStage:
    """One node's run of shards in a pipeline."""

    node_id: NodeId
    shards: tuple[int, ...]
    layers: tuple[int, int]
    """[start_layer, end_layer)."""


@dataclass(frozen=True)
class ToLoad:
    """A shard that its node loads before the plan can run; it fetches the shard first if it is not on disk."""

    node_id: NodeId
    shard_id: int
    on_disk: bool


@dataclass(frozen=True)
class Plan:
    """The stages in pipeline order, and the shards that they have to load."""

    stages: tuple[PlannedStage, ...]
    to_load: tuple[ToLoad, ...]

    def nodes(self) -> tuple[NodeId, ...]:
        """Each node once, in pipeline order."""
        return tuple(dict.fromkeys(stage.node_id for stage in self.stages))


def plan_pipeline(
    manifest: Manifest,
    nodes: Iterable[NodeShards],
    *,
    context_tokens: int = 0,
    without: Iterable[NodeId] = (),
) -> Plan:
    """Assign every shard of a model to a node.

    `context_tokens` is the length that the memory of the KV cache is computed for; the nodes in `without` are left out
    (they were lost). Raises NoSourceError if there is no node, InsufficientMemoryError if no node has the memory for
    a shard, InvalidParamsError if the manifest is not that of a model.
    """
    if manifest.model is None:
        raise InvalidParamsError(f"{manifest.name!r} is a {manifest.kind}, not a model; only a model can run")
    excluded = frozenset(without)
    known = sorted((node for node in nodes if node.node_id not in excluded), key=lambda node: node.node_id)
    if not known:
        raise NoSourceError(
            f"no node that could run {manifest.name!r} is known; start one, or give this one --bootstrap",
            {"model": manifest.name, "without": sorted(excluded)},
        )
    draft = _DraftPlan(
        manifest.shards, known, [_shard_bytes(manifest, entry, context_tokens) for entry in manifest.shards]
    )
    draft.assign_available([node.loaded for node in known], loaded=True)
    draft.assign_available([node.on_disk for node in known], loaded=False)
    draft.spread_missing()
    return draft.plan()


def _shard_bytes(manifest: Manifest, entry: ShardEntry, context_tokens: int) -> int:
    layers = (entry.end_layer or 0) - (entry.start_layer or 0)
    per_token = manifest.model.kv_bytes_per_token_layer if manifest.model else 0
    return entry.size + layers * per_token * context_tokens


class _DraftPlan:
    """Which node runs which shard, while it is filled in; shards and nodes are indices."""

    def __init__(self, shards: Sequence[ShardEntry], nodes: Sequence[NodeShards], sizes: Sequence[int]) -> None:
        self._shards, self._nodes, self._sizes = shards, nodes, sizes
        self._owner: list[int | None] = [None] * len(shards)
        self._memory = [node.memory_available_bytes for node in nodes]
        self._count = [0] * len(nodes)

    def assign_available(self, available: Sequence[frozenset[int]], *, loaded: bool) -> None:
        """Assign shards to nodes that have them, `available[node]`; those that are not loaded need memory there."""
        for shard in range(len(self._shards)):
            if self._owner[shard] is not None:
                continue
            candidates = [
                node
                for node in range(len(self._nodes))
                if shard in available[node] and (loaded or self._fits(node, shard))
            ]
            if candidates:
                before = self._owner[shard - 1] if shard else None
                best = min(
                    candidates,
                    key=lambda node: (
                        node != before,
                        -self._run_length(available[node], shard),
                        self._count[node],
                        node,
                    ),
                )
                self._assign(best, shard, loaded=loaded)

    def spread_missing(self) -> None:
        """Assign the shards that no node has, evenly. Raises InsufficientMemoryError."""
        missing = [shard for shard, owner in enumerate(self._owner) if owner is None]
        if not missing:
            return
        quotas = self._quotas(missing)
        for shard in missing:
            before, after = self._neighbour(shard, -1), self._neighbour(shard, +1)
            candidates = [node for node in quotas if self._fits(node, shard)]
            if not candidates:
                raise self._insufficient_memory(shard)
            # A node extends its run while it has quota left; the node that runs the following shards comes last.
            best = min(
                candidates,
                key=lambda node: (quotas[node] <= 0, node != before, node == after, -quotas[node], node),
            )
            quotas[best] -= 1
            self._assign(best, shard, loaded=False)

    def plan(self) -> Plan:
        stages: list[PlannedStage] = []
        to_load: list[ToLoad] = []
        for shard, owner in enumerate(self._owner):
            assert owner is not None
            node, entry = self._nodes[owner], self._shards[shard]
            start, end = entry.start_layer or 0, entry.end_layer or 0
            if stages and stages[-1].node_id == node.node_id:
                last = stages[-1]
                stages[-1] = PlannedStage(node.node_id, (*last.shards, shard), (last.layers[0], end))
            else:
                stages.append(PlannedStage(node.node_id, (shard,), (start, end)))
            if shard not in node.loaded:
                to_load.append(ToLoad(node.node_id, shard, shard in node.on_disk))
        return Plan(tuple(stages), tuple(to_load))

    def _quotas(self, missing: Sequence[int]) -> dict[int, int]:
        """How many of the missing shards each node takes, so that the totals are as even as memory allows."""
        counts, memory = list(self._count), list(self._memory)
        quotas = dict.fromkeys(range(len(self._nodes)), 0)
        for shard in missing:
            fitting = [node for node, free in enumerate(memory) if free is None or free >= self._sizes[shard]]
            if not fitting:
                continue  # spread_missing raises, with the shard's number
            node = min(fitting, key=lambda node: (counts[node], node))
            free = memory[node]
            memory[node] = None if free is None else free - self._sizes[shard]
            counts[node] += 1
            quotas[node] += 1
        return quotas

    def _neighbour(self, shard: int, step: int) -> int | None:
        """The node that runs the nearest assigned shard in that direction."""
        other = shard + step
        while 0 <= other < len(self._owner):
            if (owner := self._owner[other]) is not None:
                return owner
            other += step
        return None

    def _run_length(self, available: frozenset[int], shard: int) -> int:
        """How many unassigned shards in a row, from this one on, a node has."""
        end = shard
        while end < len(self._shards) and self._owner[end] is None and end in available:
            end += 1
        return end - shard

    def _fits(self, node: int, shard: int) -> bool:
        free = self._memory[node]
        return free is None or free >= self._sizes[shard]

    def _assign(self, node: int, shard: int, *, loaded: bool) -> None:
        self._owner[shard] = node
        self._count[node] += 1
        free = self._memory[node]
        if free is not None and not loaded:
            self._memory[node] = free - self._sizes[shard]

    def _insufficient_memory(self, shard: int) -> InsufficientMemoryError:
        available = {node.node_id: node.memory_available_bytes for node in self._nodes}
        return InsufficientMemoryError(
            f"shard {shard} needs about {self._sizes[shard]} bytes of memory, more than any of "
            f"{len(self._nodes)} nodes has left; add a node, unload a shard, or cut the model into smaller shards",
            {"shard_id": shard, "needed_bytes": self._sizes[shard], "available_bytes": available},
        )
