"""Which node runs which shard of a model: a pure function.

A shard runs where it is loaded, else where it is on disk, else missing shards are spread evenly over the nodes.
Neighbouring shards of one node become one stage, so fewer activations travel. The same input gives the same plan,
in whatever order the nodes come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protocol.errors import InsufficientMemoryError, InvalidParamsError, NoSourceError
from protocol.ids import NodeId
from protocol.manifest import Manifest, ShardEntry


@dataclass(frozen=True)
class NodeShards:
    """What a planner knows of one node."""

    node_id: NodeId
    on_disk: frozenset[int] = frozenset()
    loaded: frozenset[int] = frozenset()
    memory_available_bytes: int | None = None
    """For shards that are not loaded yet; None: not known, so not a bound."""


@dataclass(frozen=True)
class PlannedStage:
    """One node's run of shards in a pipeline."""

    node_id: NodeId
    shards: tuple[int, ...]
    layers: tuple[int, int]
    """[start_layer, end_layer)."""


@dataclass(frozen=True)
class ToLoad:
    """A shard that its node has to load before the plan can run, and fetch first where it is not on disk."""

    node_id: NodeId
    shard_id: int
    on_disk: bool


@dataclass(frozen=True)
class Plan:
    """Stages in pipeline order, and what is missing for them."""

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
    """Place every shard of a model on a node.

    `context_tokens` is what the key and value cache is counted for; `without` names nodes that are not to be used
    (they were lost). Raises NoSourceError where there is no node, InsufficientMemoryError where no node has room
    for a shard, InvalidParamsError where the manifest is not that of a model.
    """
    if manifest.model is None:
        raise InvalidParamsError(f"{manifest.name!r} is a {manifest.kind}, not a model: there is nothing to run")
    shunned = frozenset(without)
    known = sorted((node for node in nodes if node.node_id not in shunned), key=lambda node: node.node_id)
    if not known:
        raise NoSourceError(
            f"no node is known that could run {manifest.name!r}; start one, or give this one --bootstrap",
            {"model": manifest.name, "without": sorted(shunned)},
        )
    placing = _Placing(
        manifest.shards, known, [_shard_bytes(manifest, entry, context_tokens) for entry in manifest.shards]
    )
    placing.place_where_held("loaded")
    placing.place_where_held("on_disk")
    placing.spread_missing()
    return placing.plan()


def _shard_bytes(manifest: Manifest, entry: ShardEntry, context_tokens: int) -> int:
    layers = (entry.end_layer or 0) - (entry.start_layer or 0)
    per_token = manifest.model.kv_bytes_per_token_layer if manifest.model else 0
    return entry.size + layers * per_token * context_tokens


class _Placing:
    """The table of who runs what while it is filled in; shards and nodes by index."""

    def __init__(self, shards: Sequence[ShardEntry], nodes: Sequence[NodeShards], sizes: Sequence[int]) -> None:
        self._shards, self._nodes, self._sizes = shards, nodes, sizes
        self._owner: list[int | None] = [None] * len(shards)
        self._room = [node.memory_available_bytes for node in nodes]
        self._count = [0] * len(nodes)

    def place_where_held(self, tier: str) -> None:
        held = [frozenset(getattr(node, tier)) for node in self._nodes]
        for shard in range(len(self._shards)):
            if self._owner[shard] is not None:
                continue
            candidates = [
                node
                for node in range(len(self._nodes))
                if shard in held[node] and (tier == "loaded" or self._fits(node, shard))
            ]
            if candidates:
                before = self._owner[shard - 1] if shard else None
                best = min(
                    candidates,
                    key=lambda node: (node != before, -self._run(held[node], shard), self._count[node], node),
                )
                self._give(best, shard, loaded=tier == "loaded")

    def spread_missing(self) -> None:
        missing = [shard for shard, owner in enumerate(self._owner) if owner is None]
        if not missing:
            return
        quotas = self._quotas(missing)
        for shard in missing:
            before, after = self._neighbour(shard, -1), self._neighbour(shard, +1)
            candidates = [node for node in quotas if self._fits(node, shard)]
            if not candidates:
                raise self._no_room(shard)
            # A node goes on with its run as long as it has a share; who holds the next run comes as late as can be.
            best = min(
                candidates,
                key=lambda node: (quotas[node] <= 0, node != before, node == after, -quotas[node], node),
            )
            quotas[best] -= 1
            self._give(best, shard, loaded=False)

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
        """How many of the missing shards each node takes, so that all end as even as they can."""
        counts, room = list(self._count), list(self._room)
        quotas = dict.fromkeys(range(len(self._nodes)), 0)
        for shard in missing:
            roomy = [node for node, free in enumerate(room) if free is None or free >= self._sizes[shard]]
            if not roomy:
                continue  # spread_missing says so, with the shard's name
            node = min(roomy, key=lambda node: (counts[node], node))
            free = room[node]
            room[node] = None if free is None else free - self._sizes[shard]
            counts[node] += 1
            quotas[node] += 1
        return quotas

    def _neighbour(self, shard: int, step: int) -> int | None:
        """The node that runs the nearest placed shard in that direction."""
        place = shard + step
        while 0 <= place < len(self._owner):
            if (owner := self._owner[place]) is not None:
                return owner
            place += step
        return None

    def _run(self, held: frozenset[int], shard: int) -> int:
        end = shard
        while end < len(self._shards) and self._owner[end] is None and end in held:
            end += 1
        return end - shard

    def _fits(self, node: int, shard: int) -> bool:
        room = self._room[node]
        return room is None or room >= self._sizes[shard]

    def _give(self, node: int, shard: int, *, loaded: bool) -> None:
        self._owner[shard] = node
        self._count[node] += 1
        room = self._room[node]
        if room is not None and not loaded:
            self._room[node] = room - self._sizes[shard]

    def _no_room(self, shard: int) -> InsufficientMemoryError:
        rooms = {node.node_id: node.memory_available_bytes for node in self._nodes}
        return InsufficientMemoryError(
            f"shard {shard} needs about {self._sizes[shard]} bytes of memory and none of {len(self._nodes)} nodes has "
            "them left; add a node, unload something, or cut the model into smaller shards",
            {"shard_id": shard, "needed_bytes": self._sizes[shard], "available_bytes": rooms},
        )
