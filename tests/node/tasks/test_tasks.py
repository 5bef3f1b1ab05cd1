"""Task types and who adds them; where a model's shards are placed; what a generation answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from node.clock import Clock
from node.discovery.values import FoundNode, ProviderInfo
from node.pipeline.driver.attempt import GeneratedToken
from node.rpc import Call, Command, RpcServer
from node.tasks.inference import AnswerCollector, run_inference
from node.tasks.placement import Placement
from node.tasks.registry import TaskContext, TaskRegistry, TaskType
from protocol.commands.common import Params
from protocol.commands.shards import LoadShardParams, ShardResult
from protocol.commands.tasks import InferenceParams, InferenceResult
from protocol.errors import (
    InsufficientDiskError,
    InsufficientMemoryError,
    InvalidParamsError,
    NoSourceError,
    ShardNotLoadedError,
    ShoalError,
    UnreachableError,
)
from protocol.ids import ContentId, NodeId
from protocol.manifest import Manifest, ModelInfo, ShardEntry, sign_manifest
from protocol.records import NodeInfo
from protocol.signing import SigningKey

HERE, B, C = (NodeId(digit * 64) for digit in "abc")
GB = 1 << 30


# The registry


class CountParams(Params, frozen=True, kw_only=True):
    text: str
    least: int = 0


async def count_words(context: TaskContext, params: CountParams, call: Call) -> dict[str, int]:
    return {"words": max(params.least, len(params.text.split()))}


COUNT_WORDS = TaskType("count_words", CountParams, count_words)
THIRD_PARTY = """
from protocol.commands.common import Params
from node.tasks.registry import TaskType
import time

class ShoutParams(Params, frozen=True, kw_only=True):
    text: str

async def shout(context, params, call):
    return {"text": params.text.upper() + "!"}

SHOUT = TaskType("shout", ShoutParams, shout)
IMPOSTOR = TaskType("verify_shard", ShoutParams, shout)
NO_TASK = {"name": "no_task"}
"""
ENTRY_POINTS = """[shoal.tasks]
shout = third_party_task:SHOUT
verify_shard = third_party_task:IMPOSTOR
no_task = third_party_task:NO_TASK
missing = third_party_task:MISSING
no_module = third_party_that_is_not_there:TASK
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package with one good task type, one that takes a name of ours, and three that are broken."""
    info = tmp_path / "third_party_task-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party-task\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "third_party_task.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("third_party_task", None)


async def run(registry: TaskRegistry, **parameters: Any) -> Any:
    return await registry.execute(cast(TaskContext, None), parameters, cast(Call, None))


async def test_a_package_adds_a_task_type_and_its_broken_ones_are_left_out(
    third_party: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        registry = TaskRegistry.from_entry_points()
    assert registry.names() == ["ai_inference", "shout", "verify_shard"]
    assert await run(registry, task_type="shout", text="fish") == {"text": "FISH!"}
    for name in ("no_task", "missing", "no_module"):
        assert f"task type {name} " in caplog.text


async def test_nobody_takes_over_a_task_type_of_ours(third_party: None, caplog: pytest.LogCaptureFixture) -> None:
    registry = TaskRegistry.from_entry_points()
    with pytest.raises(InvalidParamsError, match="text"):  # the impostor would take it
        await run(registry, task_type="verify_shard", text="fish")
    assert "a second task type verify_shard is left out" in caplog.text


def test_the_built_in_types_are_there() -> None:
    assert TaskRegistry.from_entry_points().names() == ["ai_inference", "verify_shard"]


async def test_parameters_are_those_of_the_type() -> None:
    registry = TaskRegistry([COUNT_WORDS])
    assert await run(registry, task_type="count_words", text="a b c") == {"words": 3}
    assert await run(registry, task_type=b"count_words", text=b"a b c", least=7) == {"words": 7}
    with pytest.raises(InvalidParamsError, match="least"):
        await run(registry, task_type="count_words", text="a", least="many")
    with pytest.raises(InvalidParamsError, match="lest"):
        await run(registry, task_type="count_words", text="a", lest=1)


@pytest.mark.parametrize("name", [None, "", "no_such", 7, ["count_words"], b"\xff"])
async def test_an_unknown_type_names_those_there_are(name: object) -> None:
    with pytest.raises(InvalidParamsError, match="count_words") as caught:
        await run(TaskRegistry([COUNT_WORDS]), task_type=name)
    assert caught.value.details == {"task_types": ["count_words"]}


# Placement

SIGNED = sign_manifest(
    Manifest(
        name="smol",
        kind="model",
        shards=tuple(
            ShardEntry(
                shard_id=i,
                filename=f"shard-{i}.gguf",
                size=1000,
                content_id=ContentId(f"{i}" * 64),
                kind="gguf",
                start_layer=10 * i,
                end_layer=10 * i + 10,
            )
            for i in range(3)
        ),
        model=ModelInfo(architecture="llama", n_layers=30, n_embd=64, context_length=256),
    ),
    SigningKey.generate(),
)


class Cluster:
    """Nodes that answer LOAD_SHARD, as discovery tells of them. It is the `shards`, `stages` and `discovery` too."""

    def __init__(self) -> None:
        self.ports: dict[NodeId, int] = {}
        self.held: dict[NodeId, set[int]] = {HERE: set(), B: set(), C: set()}
        self.refuse: dict[NodeId, ShoalError] = {}
        self.asked: list[tuple[NodeId, int]] = []

    async def resolve(self, kind: str, name: str | None) -> Any:
        return SIGNED

    def on_disk(self, digest: str) -> frozenset[int]:
        return frozenset()

    def loaded(self, digest: str) -> frozenset[int]:
        return frozenset(self.held[HERE])

    async def find_providers(self, digest: str) -> list[ProviderInfo]:
        return [
            ProviderInfo(node, "127.0.0.1", self.ports[node], 1, frozenset(held), frozenset(held))
            for node, held in self.held.items()
            if held and node != HERE
        ]

    async def list_nodes(self) -> list[FoundNode]:
        return [FoundNode(node, NodeInfo("127.0.0.1", self.ports[node], 1, 1, GB, 1)) for node in (B, C)]

    def placement(self, *, auto_load: bool = True) -> Placement:
        context = TaskContext(HERE, ("127.0.0.1", self.ports[HERE]), *cast(Any, (self, self, self)), ctx_size=64)
        return Placement(context, SIGNED, auto_load, 64, lambda _: None)

    def command(self, node: NodeId) -> Command:
        async def load(params: LoadShardParams, call: Call) -> ShardResult:
            assert params.model == f"smol@{SIGNED.digest}"
            self.asked.append((node, params.shard_id))
            if node in self.refuse:
                raise self.refuse[node]
            self.held[node].add(params.shard_id)
            return ShardResult(
                shard_id=params.shard_id,
                status="loaded",
                path="",
                source="local",
                bytes=1,
                seconds=0.0,
                content_id=ContentId("0" * 64),
            )

        return Command(LoadShardParams, load)


@contextlib.asynccontextmanager
async def running_cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    async with contextlib.AsyncExitStack() as stack:
        for node in cluster.held:
            server = RpcServer({"LOAD_SHARD": cluster.command(node)}, node)
            cluster.ports[node] = (await stack.enter_async_context(server.serve())).port
        yield cluster


def owners(plan: Any) -> dict[int, NodeId]:
    return {shard: stage.node_id for stage in plan.stages for shard in stage.shards}


async def test_missing_shards_are_spread_and_loaded_on_their_nodes() -> None:
    async with running_cluster() as cluster:
        plan = await cluster.placement().make_plan(frozenset())
        assert sorted(cluster.asked) == sorted((node, shard) for shard, node in owners(plan).items())
        assert set(owners(plan).values()) == {HERE, B, C}


async def test_a_coordinator_that_has_nothing_leaves_the_work_to_those_who_have() -> None:
    async with running_cluster() as cluster:
        cluster.held[B], cluster.held[C] = {0, 1}, {2}
        plan = await cluster.placement(auto_load=False).make_plan(frozenset())
        assert owners(plan) == {0: B, 1: B, 2: C}
        assert cluster.asked == []


async def test_without_auto_load_the_error_says_where_to_load_what() -> None:
    async with running_cluster() as cluster:
        cluster.held[B] = {0, 2}
        with pytest.raises(ShardNotLoadedError, match=r"shards \[1\] of smol; LOAD_SHARD") as caught:
            await cluster.placement(auto_load=False).make_plan(frozenset())
        assert caught.value.details["shards"] == [1]
        assert cluster.asked == []


async def test_a_node_that_fails_to_load_keeps_what_it_has_and_gets_no_more() -> None:
    async with running_cluster() as cluster:
        cluster.held[C], cluster.held[B] = {0}, {1}
        cluster.refuse[B] = InsufficientDiskError("the disk of B is full")
        plan = await cluster.placement().make_plan(frozenset({HERE}))
        assert cluster.asked[0] == (B, 2), "it was not asked first: the test sees nothing"
        assert owners(plan) == {0: C, 1: B, 2: C}


async def test_a_node_that_is_gone_is_planned_around() -> None:
    async with running_cluster() as cluster:
        cluster.held[C] = {0}
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
            cluster.ports[B] = free.getsockname()[1]
        plan = await cluster.placement().make_plan(frozenset())
        assert B not in owners(plan).values()
        assert owners(plan)[0] == C


async def test_when_nobody_can_the_reason_is_a_nodes_and_no_source_is_not_asked_for_everywhere() -> None:
    async with running_cluster() as cluster:
        cluster.refuse = {node: InsufficientMemoryError(f"{node[0]} is full") for node in (HERE, B, C)}
        with pytest.raises(InsufficientMemoryError, match=r"^[abc] is full"):
            await cluster.placement().make_plan(frozenset())
        assert {node for node, _ in cluster.asked} == {HERE, B, C}
        with pytest.raises(InsufficientMemoryError, match=r"^[ac] is full"):
            await cluster.placement().make_plan(frozenset({B}))

        cluster.asked.clear()
        cluster.refuse = {C: NoSourceError("nobody has it")}
        with pytest.raises(NoSourceError, match="nobody has it"):
            await cluster.placement().make_plan(frozenset())
        assert len(cluster.asked) == 3, "what nobody has is not looked for from every node"


async def test_no_connection_to_a_node_that_is_not_of_the_plan() -> None:
    async with running_cluster() as cluster:
        with pytest.raises(UnreachableError):
            async with cluster.placement().connect(B):
                pass


# What a generation answers


class Told:
    """The client's side of a call: what it was notified of."""

    request_id = "r1"

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []

    def notify(self, method: str, params: msgspec.Struct) -> None:
        assert method == "TASK_OUTPUT"
        self.output.append(msgspec.to_builtins(params))


class StoppedClock(Clock):
    """A clock that is set."""

    seconds = 7.0

    def now(self) -> float:
        return self.seconds


class FakeGeneration:
    """Yields the pieces that it is given, `pause_s` apart on its clock, after `load`."""

    plan = None
    prompt_tokens = 5

    def __init__(
        self, pieces: list[bytes | None], load: Callable[[], None], clock: StoppedClock, pause_s: float
    ) -> None:
        self.pieces, self.load, self.clock, self.pause_s = pieces, load, clock, pause_s
        self.closed = False

    async def tokens(self) -> AsyncIterator[GeneratedToken]:
        try:
            self.load()
            for number, piece in enumerate(self.pieces):
                await asyncio.sleep(0)
                self.clock.seconds += self.pause_s
                yield GeneratedToken(number, piece or b"", piece is None)
        finally:
            self.closed = True


async def answer(
    pieces: list[bytes | None], *, pause_s: float = 0.0, load_s: float = 0.0, **options: Any
) -> tuple[InferenceResult, Told, FakeGeneration]:
    told = Told()
    placement = type("Placed", (), {"load_s": 0.0})()
    clock = StoppedClock()

    def load() -> None:
        placement.load_s = load_s
        clock.seconds += load_s

    generation = FakeGeneration(pieces, load, clock, pause_s)
    params = InferenceParams(prompt="x", stream=True, **options)
    result = await AnswerCollector(params, *cast(Any, (told, generation, placement)), clock).collect()
    return result, told, generation


async def test_text_that_ends_inside_a_character() -> None:
    result, told, _ = await answer([b"fish ", b"\xf0\x9f", b"\x90"])
    assert result.text == "fish \ufffd"
    assert [one["text"] for one in told.output] == ["fish ", "\ufffd"]
    assert [one["tokens"] for one in told.output] == [[0], [1, 2]]
    assert (result.finish_reason, result.usage.completion_tokens) == ("length", 3)


async def test_tokens_whose_text_is_held_back_are_still_told() -> None:
    result, told, _ = await answer([b"ab", b"ST", b"OP"], stop=("STOPPED",))
    assert result.text == "abSTOP" == "".join(one["text"] for one in told.output)
    assert [token for one in told.output for token in one["tokens"]] == result.tokens == [0, 1, 2]


async def test_a_stop_string_ends_the_generation_and_the_session() -> None:
    result, told, generation = await answer([b"ab", b"ST", b"OP", b"never"], stop=("STOP",))
    assert (result.text, result.finish_reason, result.tokens) == ("ab", "stop", [0, 1, 2])
    assert "".join(one["text"] for one in told.output) == "ab"
    assert [token for one in told.output for token in one["tokens"]] == result.tokens
    assert generation.closed


async def test_an_end_token_is_no_part_of_the_answer() -> None:
    result, _, _ = await answer([b"ab", None])
    assert (result.text, result.tokens, result.finish_reason) == ("ab", [0], "stop")
    empty, told, _ = await answer([None])
    assert (empty.text, empty.tokens, told.output) == ("", [], [])


async def test_figures_are_those_of_the_clock() -> None:
    result, _, _ = await answer([b"a", b"b", b"c", None], pause_s=0.05, load_s=0.02)
    timings = result.timings
    assert timings.load_s == 0.02
    assert timings.time_to_first_token_s == pytest.approx(0.05)
    assert timings.total_s == pytest.approx(0.2)
    # Three tokens after the first, the ending one among them, each 50 ms.
    assert timings.tokens_per_s == pytest.approx(20.0)
    alone, _, _ = await answer([b"a"])
    assert alone.timings.tokens_per_s == 0.0


@pytest.mark.parametrize("given", [{}, {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}])
async def test_a_task_has_either_a_prompt_or_messages(given: dict[str, Any]) -> None:
    params = msgspec.convert(given, InferenceParams)
    with pytest.raises(InvalidParamsError, match="either"):
        await run_inference(*cast(Any, (None, params, None)))
