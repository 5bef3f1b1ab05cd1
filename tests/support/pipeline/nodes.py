"""Nodes that only run stages: real engine processes, real transport, real RPC, and slices of a model."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from node.background import Background
from node.handlers.sessions import SessionHandlers
from node.handlers.table import session_commands
from node.pipeline.driver.attempt import DriverSettings, GenerationRequest
from node.pipeline.driver.generation import Generation
from node.pipeline.driver.plan import NodeShards, Plan, plan_pipeline
from node.pipeline.engine.batch import Slot
from node.pipeline.engine.engine import Engine
from node.pipeline.engine.settings import PREFILL_CHUNK, EngineSettings
from node.pipeline.stage.process import StageSettings
from node.pipeline.stage.stages import Stages
from node.rpc import RpcServer
from protocol.client import Client
from protocol.commands.tasks import Sampling
from protocol.ids import ManifestDigest, NodeId
from protocol.manifest import MANIFEST_FILENAME, Manifest
from tests.support.waiting import eventually

SETTINGS = EngineSettings(threads=1, ctx_size=256, max_sessions=3)
N_SLICES = 3


@dataclass(frozen=True)
class Slices:
    """A model cut into shards."""

    folder: Path
    manifest: Manifest

    @property
    def digest(self) -> ManifestDigest:
        return self.manifest.digest

    def path(self, shard_id: int) -> Path:
        return self.folder / self.manifest.shard(shard_id).filename


def read_slices(folder: Path) -> Slices:
    """A folder that `split` wrote."""
    content = msgspec.json.decode((folder / MANIFEST_FILENAME).read_bytes())
    return Slices(folder, msgspec.convert(content["manifest"], Manifest))


@dataclass
class StageNode:
    """What a node is to a driver."""

    node_id: NodeId
    stages: Stages
    server: RpcServer
    died: list[frozenset[int]] = field(default_factory=list)

    async def load(self, slices: Slices, shards: Sequence[int]) -> None:
        for shard_id in shards:
            if shard_id not in self.stages.loaded(slices.digest):
                await self.stages.load(slices.digest, shard_id, slices.path(shard_id), name="smollm2")

    async def engine_pid(self) -> int:
        [status], _ = await self.stages.status()
        return status.pid


@contextlib.asynccontextmanager
async def stage_node(name: str) -> AsyncIterator[StageNode]:
    died: list[frozenset[int]] = []
    async with (
        Stages.open(StageSettings(SETTINGS), on_died=lambda _, shards, __: died.append(shards)) as stages,
        Background.open() as background,
    ):
        handlers = SessionHandlers(stages, background)
        server = RpcServer(session_commands(handlers), NodeId(name))
        async with server.serve():
            yield StageNode(NodeId(name), stages, server, died)


class Cluster:
    """Nodes by name, and how to drive a generation over them."""

    def __init__(self, slices: Slices, nodes: Sequence[StageNode]) -> None:
        self.slices = slices
        self.nodes = {node.node_id: node for node in nodes}
        self.plans: list[Plan] = []

    async def plan(self, without: frozenset[NodeId]) -> Plan:
        known = [
            NodeShards(node.node_id, frozenset(range(N_SLICES)), node.stages.loaded(self.slices.digest))
            for node in self.nodes.values()
        ]
        plan = plan_pipeline(self.slices.manifest, known, without=without)
        for missing in plan.to_load:
            await self.nodes[missing.node_id].load(self.slices, [missing.shard_id])
        self.plans.append(plan)
        return plan

    @contextlib.asynccontextmanager
    async def connect(self, node_id: NodeId) -> AsyncIterator[Client]:
        async with Client.connect("127.0.0.1", self.nodes[node_id].server.port) as client:
            yield client

    def generation(
        self, prompt: str, max_tokens: int, *, settings: DriverSettings | None = None, **more: object
    ) -> Generation:
        request = GenerationRequest(
            model=self.slices.digest, context_length=2048, prompt=prompt, max_tokens=max_tokens, **more
        )
        return Generation(request, self.plan, self.connect, settings or DriverSettings())

    async def generate(self, prompt: str, max_tokens: int, **more: object) -> list[int]:
        async with contextlib.aclosing(self.generation(prompt, max_tokens, **more).tokens()) as tokens:
            return [token.token async for token in tokens]


@contextlib.asynccontextmanager
async def stage_nodes(count: int) -> AsyncIterator[list[StageNode]]:
    """Nodes that have loaded nothing."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(stage_node(f"{n:064x}")) for n in range(count)]


@contextlib.asynccontextmanager
async def arranged(slices: Slices, hosts: Sequence[StageNode], runs: Sequence[Sequence[int]]) -> AsyncIterator[Cluster]:
    """A cluster in which each run of shards is loaded on a node of its own, and nothing else is.

    What is loaded there already stays. At the end no session may be left open.
    """

    async def arrange(host: StageNode, run: Sequence[int]) -> None:
        await host.load(slices, run)
        for shard_id in host.stages.loaded(slices.digest) - set(run):
            await host.stages.unload(slices.digest, shard_id)
        host.died.clear()

    await asyncio.gather(*itertools.starmap(arrange, itertools.zip_longest(hosts, runs, fillvalue=())))
    nodes = list(hosts[: len(runs)])
    yield Cluster(slices, nodes)

    async def sessions() -> int:
        return sum([status.sessions for node in nodes for status in (await node.stages.status())[0]])

    async def all_closed() -> bool:
        return await sessions() == 0

    await eventually(all_closed)


class WholeModel:
    """The reference: the same engine on the uncut file, in the shapes of a session that is alone."""

    def __init__(self, model: Path) -> None:
        self._engine = Engine(SETTINGS)
        self._engine.load(0, model)
        self.tokenizer = self._engine.vocabulary(0)
        self._streams: dict[tuple[str, Sampling], tuple[list[int], Iterator[int]]] = {}

    def generate(self, prompt: str, max_tokens: int, sampling: Sampling | None = None) -> list[int]:
        """At most `max_tokens` tokens; each is computed once. At most `max_sessions` prompts."""
        asked = (prompt, sampling or Sampling())
        found, stream = self._streams.setdefault(asked, ([], self._stream(*asked)))
        found += itertools.islice(stream, max(0, max_tokens - len(found)))
        return found[:max_tokens]

    def _stream(self, prompt: str, sampling: Sampling) -> Iterator[int]:
        engine, sequence = self._engine, self._engine.open_sequence()
        values = np.asarray(self.tokenizer.tokenize(prompt, add_special=True, parse_special=False), np.int32)
        position = 0
        while True:
            for start in range(0, len(values), PREFILL_CHUNK):
                chunk = values[start : start + PREFILL_CHUNK]
                [logits] = engine.forward([0], [Slot(sequence, position, chunk)])
                position += len(chunk)
            token = engine.sample(logits, sampling, position)
            yield token
            if self.tokenizer.is_end(token):
                return
            values = np.asarray([token], np.int32)

    def close(self) -> None:
        self._engine.close()
