"""The driver of a generation against nodes that follow a script: attempts, replay, and what is closed when."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest

from node.pipeline.driver.attempt import DriverSettings, GenerationRequest
from node.pipeline.driver.generation import Generation
from node.pipeline.driver.plan import Plan, PlannedStage
from protocol.commands.common import Empty
from protocol.commands.sessions import (
    OpenSessionParams,
    OpenSessionResult,
    SessionFailed,
    SessionToken,
    StartSessionParams,
    TokenizeParams,
    TokenizeResult,
)
from protocol.errors import (
    BusyError,
    ContextOverflowError,
    EngineError,
    InvalidParamsError,
    PeerLostError,
    ShoalError,
    StageLostError,
    UnreachableError,
)
from protocol.ids import ManifestDigest, NodeId

PROMPT = [5, 6, 7]
ANSWER = [10, 11, 12, 13, 14, 15]
END = 15
QUICK = DriverSettings(lost_node_timeout_s=0.01)

Disturb = Callable[["World", "Node", int], bool]
"""Called before each token with its index; True: the script took over, no more tokens come."""


@dataclass
class Node:
    """One connection to a node."""

    world: World
    name: str
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    callbacks: dict[str, Callable[[str, dict[str, Any]], None]] = field(default_factory=dict)

    def on(self, method: str, callback: Callable[[str, dict[str, Any]], None]) -> None:
        self.callbacks[method] = callback

    async def call(self, method: str, params: Any, *, result_type: Any, timeout_s: float | None = None) -> Any:
        await asyncio.sleep(0)
        if self.closed.is_set():
            raise UnreachableError("closed")
        self.world.log.append((method, self.name, params))
        if method in self.world.refusals:
            raise self.world.refusals[method]
        match params:
            case TokenizeParams():
                return TokenizeResult(tokens=np.asarray(self.world.prompt, "<i4").tobytes())
            case OpenSessionParams(stage=stage):
                return OpenSessionResult(ticket=f"ticket {stage}")
            case StartSessionParams(stage=0, replay=replay, attempt=attempt, session=session):
                self.world.draw(session, attempt, len(replay) // 4)
        return Empty()

    def notify(self, event: SessionToken | SessionFailed) -> None:
        method = "SESSION_TOKEN" if isinstance(event, SessionToken) else "SESSION_FAILED"
        self.callbacks[method](method, msgspec.to_builtins(event, builtin_types=(bytes,)))


@dataclass
class World:
    """Nodes "a" and "b", and "c" in reserve."""

    disturb: list[Disturb] = field(default_factory=list)
    """One for each attempt, as far as there are any."""
    refusals: dict[str, ShoalError] = field(default_factory=dict)
    unreachable: set[str] = field(default_factory=set)
    prompt: list[int] = field(default_factory=lambda: list(PROMPT))
    log: list[tuple[str, str, Any]] = field(default_factory=list)
    plans: list[frozenset[NodeId]] = field(default_factory=list)
    open: dict[str, Node] = field(default_factory=dict)
    disturbed: asyncio.Event = field(default_factory=asyncio.Event)

    async def plan(self, without: frozenset[NodeId]) -> Plan:
        self.plans.append(without)
        names = [NodeId(name) for name in "abc" if name not in without][:2]
        return Plan(tuple(PlannedStage(name, (n,), (n, n + 1)) for n, name in enumerate(names)), ())

    @contextlib.asynccontextmanager
    async def connect(self, node_id: NodeId) -> AsyncIterator[Node]:
        if node_id in self.unreachable:
            raise UnreachableError(f"{node_id} is not there")
        node = self.open[node_id] = Node(self, node_id)
        try:
            yield node
        finally:
            node.closed.set()
            del self.open[node_id]

    def draw(self, session: str, attempt: int, known: int) -> None:
        last = list(self.open.values())[-1]
        disturb = self.disturb[attempt] if attempt < len(self.disturb) else None
        for index in range(known, len(ANSWER)):
            if disturb is not None and disturb(self, last, index):
                self.disturbed.set()
                return
            last.notify(self.token(session, attempt, index))

    def token(self, session: str, attempt: int, index: int) -> SessionToken:
        return SessionToken(
            session=session,
            attempt=attempt,
            position=len(self.prompt) + index,
            token=ANSWER[index],
            piece=b"<%d>" % ANSWER[index],
            end=ANSWER[index] == END,
        )

    def generation(self, **more: Any) -> Generation:
        request = {"model": ManifestDigest("0" * 64), "context_length": 100, "prompt": "x", "max_tokens": 20, **more}
        return Generation(GenerationRequest(**request), self.plan, self.connect, QUICK)

    def calls(self, method: str) -> list[tuple[str, Any]]:
        return [(name, params) for called, name, params in self.log if called == method]


async def collected(generation: Generation, into: list[int] | None = None) -> list[int]:
    found = [] if into is None else into
    async with contextlib.aclosing(generation.tokens()) as tokens:
        async for token in tokens:
            found += [token.token]
    return found


def failing(error: ShoalError, at: int) -> Disturb:
    def disturb(world: World, node: Node, index: int) -> bool:
        if index < at:
            return False
        _, params = world.calls("OPEN_SESSION")[-1]
        node.notify(SessionFailed(session=params.session, attempt=params.attempt, stage=0, error=error.to_wire()))
        return True

    return disturb


async def test_the_way_of_a_session() -> None:
    world = World()
    assert await collected(world.generation()) == ANSWER
    methods = [(method, getattr(params, "stage", None)) for method, _, params in world.log]
    assert methods[0] == ("TOKENIZE", None)
    assert sorted(methods[1:3]) == [("OPEN_SESSION", 0), ("OPEN_SESSION", 1)]
    assert methods[3:5] == [("START_SESSION", 1), ("START_SESSION", 0)], "the first stage begins last"
    assert sorted(methods[5:]) == [("CLOSE_SESSION", 0), ("CLOSE_SESSION", 1)]
    (_, last), (_, first) = world.calls("START_SESSION")
    assert (first.next_ticket, last.next_ticket) == ("ticket 1", "ticket 0")
    assert (np.frombuffer(first.tokens, "<i4").tolist(), last.tokens) == (PROMPT, b"")
    keys = {params.key for _, params in world.calls("OPEN_SESSION")}
    assert len(keys) == 1
    assert {params.n_positions for _, params in world.calls("OPEN_SESSION")} == {23}


async def test_it_ends_at_max_tokens() -> None:
    assert await collected(World().generation(max_tokens=4)) == ANSWER[:4]


async def test_a_failed_attempt_is_replayed_with_another_key() -> None:
    world = World([failing(PeerLostError("gone"), 3)])
    generation = world.generation()
    assert await collected(generation) == ANSWER
    assert generation.attempts == 2
    assert world.plans == [frozenset(), frozenset()], "who reports a failure is alive"
    start = [params for _, params in world.calls("START_SESSION") if params.stage == 0][1]
    assert np.frombuffer(start.replay, "<i4").tolist() == ANSWER[:3]
    assert (start.attempt, start.max_tokens) == (1, 17)
    opened = [params for _, params in world.calls("OPEN_SESSION")]
    assert {params.n_positions for params in opened} == {23}
    assert len({params.key for params in opened}) == 2
    assert len(world.calls("TOKENIZE")) == 1
    assert len(world.calls("CLOSE_SESSION")) == 4


async def test_a_node_whose_connection_is_lost_is_left_out() -> None:
    def lose(world: World, node: Node, index: int) -> bool:
        if index == 2:
            world.open["a"].closed.set()
        return index >= 2

    world = World([lose])
    assert await collected(world.generation()) == ANSWER
    assert world.plans == [frozenset(), frozenset({"a"})]


async def test_a_neighbour_may_notice_first() -> None:
    def lose(world: World, node: Node, index: int) -> bool:
        failing(PeerLostError("stage 0 does not answer"), 2)(world, node, index)
        if index == 2:
            asyncio.get_running_loop().call_later(0.001, world.open["a"].closed.set)
        return index >= 2

    world = World([lose])
    assert await collected(world.generation()) == ANSWER
    assert world.plans[1] == {"a"}


async def test_an_unreachable_node_is_left_out() -> None:
    world = World(unreachable={"b"})
    assert await collected(world.generation()) == ANSWER
    assert world.plans == [frozenset(), frozenset({"b"})]


async def test_three_attempts_and_no_more() -> None:
    world = World([failing(EngineError("boom"), 1), failing(EngineError("boom"), 2), failing(EngineError("boom"), 4)])
    found: list[int] = []

    with pytest.raises(StageLostError, match="broke 3 times, the last time after 4 tokens: boom"):
        await collected(world.generation(), found)
    assert found == ANSWER[:4]
    assert not world.open


@pytest.mark.parametrize("error", [ContextOverflowError("too long"), BusyError("full"), InvalidParamsError("no")])
async def test_what_another_attempt_cannot_mend_is_raised_at_once(error: ShoalError) -> None:
    world = World(refusals={"OPEN_SESSION": error})
    with pytest.raises(type(error), match=error.message):
        await collected(world.generation())
    assert len(world.plans) == 1
    assert not world.open
    world = World([failing(error, 1)])
    with pytest.raises(type(error), match=error.message):
        await collected(world.generation())
    assert len(world.calls("CLOSE_SESSION")) == 2


async def test_the_context_is_checked_before_anything_is_opened() -> None:
    world = World()
    with pytest.raises(ContextOverflowError, match="takes 3 tokens and the answer up to 98"):
        await collected(world.generation(max_tokens=98))
    assert [method for method, _, _ in world.log] == ["TOKENIZE"]
    with pytest.raises(InvalidParamsError, match="no tokens"):
        await collected(World(prompt=[]).generation())


async def test_tokens_of_a_dead_attempt_or_another_session_are_not_taken() -> None:
    def meddle(world: World, node: Node, index: int) -> bool:
        session = world.calls("OPEN_SESSION")[-1][1].session
        node.notify(world.token(session, 0, index))
        node.notify(world.token("another", 1, index))
        return False

    world = World([failing(PeerLostError("gone"), 2), meddle])
    generation = world.generation()
    assert await collected(generation) == ANSWER
    assert generation.attempts == 2


async def test_a_gap_is_not_passed_on() -> None:
    def skip(world: World, node: Node, index: int) -> bool:
        if index == 2:
            session = world.calls("OPEN_SESSION")[-1][1].session
            node.notify(world.token(session, 0, 3))
        return index >= 2

    world = World([skip])
    generation = world.generation()
    assert await collected(generation) == ANSWER
    assert generation.attempts == 2


async def test_a_pipeline_that_is_stuck_is_given_up() -> None:
    world = World([lambda _, __, index: index >= 2] * 3)
    generation = world.generation()
    generation.settings = DriverSettings(token_timeout_s=0.01, lost_node_timeout_s=0.01)
    found: list[int] = []
    with pytest.raises(StageLostError, match=r"broke 3 times, the last time after 2 tokens: no token came for 0\.01 s"):
        await collected(generation, found)
    assert found == ANSWER[:2]
    assert not world.open


async def test_leaving_early_and_cancelling_close_the_session() -> None:
    world = World()
    async with contextlib.aclosing(world.generation().tokens()) as tokens:
        async for _ in tokens:
            break
    assert len(world.calls("CLOSE_SESSION")) == 2

    world = World([lambda _, __, index: index == 1])
    task = asyncio.create_task(collected(world.generation()))
    await asyncio.wait_for(world.disturbed.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(world.calls("CLOSE_SESSION")) == 2
    assert not world.open
