"""Sessions over stages: order, shapes, batches, bounds, failures. Scheduling only: small engine, memory transport."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
from pipeline_parts import END_TOKEN, MemoryNetwork, TinyEngine

from node.pipeline.batching import EngineThread
from node.pipeline.channels import Channels, channel_name
from node.pipeline.pipe import (
    Answer,
    Broken,
    Close,
    Condition,
    Drawn,
    FromProcess,
    Inspect,
    Load,
    Open,
    Order,
    Refused,
    Request,
    Start,
    Tokenize,
    Tokens,
    Unload,
)
from node.pipeline.worker import Worker, WorkerSettings
from protocol.commands.common import ChatMessage
from protocol.commands.sessions import (
    CloseSessionParams,
    OpenSessionParams,
    SessionFailed,
    SessionToken,
    StartSessionParams,
    TokenizeParams,
)
from protocol.commands.tasks import Sampling
from protocol.errors import ShoalError, error_from_wire
from protocol.ids import ManifestDigest

MODEL = ManifestDigest("0" * 64)
KEY = b"k" * 32


class Stage:
    """A worker as the daemon sees it, without a process."""

    def __init__(self, network: MemoryNetwork, ticket: str, engine: TinyEngine) -> None:
        self.network, self.ticket, self.engine = network, ticket, engine
        self.endpoint = network.endpoint(ticket)
        self.events: asyncio.Queue[SessionToken | SessionFailed] = asyncio.Queue()
        self.seen: list[SessionToken] = []
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.worker: Worker
        self.thread: EngineThread

    @contextlib.asynccontextmanager
    async def running(self, shards: Sequence[int], max_sessions: int = 4) -> AsyncIterator[Stage]:
        settings = WorkerSettings(ctx_size=256, max_sessions=max_sessions)
        async with EngineThread(self.engine) as self.thread:
            async with Worker(self.thread, Channels(self.endpoint), settings, self._take) as self.worker:
                for shard_id in shards:
                    await self.order(Load(shard_id, "/nowhere"))
                yield self
            assert not self.engine.open, "a sequence was left open"
        assert not [name for name in self.network.inboxes if name[0] == self.ticket], "an inbox was left open"

    async def order(self, order: Order) -> Any:
        number = len(self._answers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        self.worker.handle(Request(number, order))
        return await self._answers[number]

    def _take(self, message: FromProcess) -> None:
        match message:
            case Answer(number, result):
                self._answers[number].set_result(result)
            case Refused(number, error):
                self._answers[number].set_exception(error_from_wire(error))
            case Drawn(_, token):
                self.network.log.append(f"report {token.position}")
                self.seen.append(token)
                self.events.put_nowait(token)
            case Broken(failed):
                self.events.put_nowait(failed)

    async def token(self, session: str | None = None) -> SessionToken:
        while True:
            event = await asyncio.wait_for(self.events.get(), 10)
            assert isinstance(event, SessionToken), event
            if session in (None, event.session):
                return event

    async def failure(self) -> ShoalError:
        while isinstance(event := await asyncio.wait_for(self.events.get(), 10), SessionToken):
            pass
        return error_from_wire(event.error)


@contextlib.asynccontextmanager
async def pipeline(*shards: Sequence[int], engines: Sequence[TinyEngine] = ()) -> AsyncIterator[list[Stage]]:
    """One process for each run of shards."""
    network = MemoryNetwork()
    n_shards = 1 + max(shard for run in shards for shard in run)
    async with contextlib.AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                Stage(network, f"t{n}", engines[n] if engines else TinyEngine(n_shards)).running(run)
            )
            for n, run in enumerate(shards)
        ]


def int32(values: Sequence[int]) -> bytes:
    return np.asarray(values, "<i4").tobytes()


def opening(number: int, n_stages: int, shards: Sequence[int], **more: Any) -> OpenSessionParams:
    given: dict[str, Any] = {"session": "s", "key": KEY, "model": MODEL, "n_positions": 50, **more}
    return OpenSessionParams(stage=number, n_stages=n_stages, shards=tuple(shards), **given)


async def begin(
    stages: Sequence[Stage],
    runs: Sequence[Sequence[int]],
    prompt: Sequence[int],
    max_tokens: int,
    *,
    replay: Sequence[int] = (),
    session: str = "s",
    **more: Any,
) -> None:
    """Open and start a session over `stages`, stage k with the shards `runs[k]`."""
    n_positions = len(prompt) + len(replay) + max_tokens
    for number, (stage, run) in enumerate(zip(stages, runs, strict=True)):
        await stage.order(Open(opening(number, len(runs), run, session=session, n_positions=n_positions, **more)))
    for number in reversed(range(len(stages))):
        await stages[number].order(
            Start(
                StartSessionParams(
                    session=session,
                    attempt=more.get("attempt", 0),
                    stage=number,
                    next_ticket=stages[(number + 1) % len(stages)].ticket,
                    tokens=int32(prompt) if number == 0 else b"",
                    replay=int32(replay) if number == 0 else b"",
                    max_tokens=max_tokens,
                )
            )
        )


async def end(stages: Sequence[Stage], session: str = "s", attempt: int = 0) -> None:
    for number, stage in enumerate(stages):
        await stage.order(Close(CloseSessionParams(session=session, attempt=attempt, stage=number)))


async def drawn(stage: Stage, count: int, session: str | None = None) -> list[int]:
    return [(await stage.token(session)).token for _ in range(count)]


async def reference(prompt: Sequence[int], count: int, n_shards: int) -> list[int]:
    async with pipeline(range(n_shards)) as [whole]:
        await begin([whole], [range(n_shards)], prompt, count)
        return await drawn(whole, count)


PROMPT = [(7 * n + 3) % 90 for n in range(70)]


@pytest.mark.parametrize("runs", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1, 2], [3]]])
async def test_stages_draw_what_one_process_draws(runs: list[list[int]]) -> None:
    expected = await reference(PROMPT, 12, 4)
    async with pipeline(*runs) as stages:
        await begin(stages, runs, PROMPT, 12)
        tokens = [await stages[-1].token() for _ in range(12)]
        assert [token.token for token in tokens] == expected
        assert [token.position for token in tokens] == list(range(70, 82))
        assert [token.piece for token in tokens] == [b"<%d>" % token for token in expected]
        assert stages[0].engine.shapes[:4] == [[32], [32], [6], [1]]
        assert len(stages[0].engine.shapes) == 3 + 11, "the last token needs no forward"
        await end(stages)


async def test_two_stages_of_one_process_meet_in_it() -> None:
    expected = await reference(PROMPT, 8, 3)
    async with pipeline([0, 2], [1]) as [ends, middle]:
        stages = [ends, middle, ends]
        await begin(stages, [[0], [1], [2]], PROMPT, 8)
        assert await drawn(ends, 8) == expected
        assert not [line for line in ends.network.log if line == f"t0 {channel_name('s', 0, 0)}"]
        await end(stages)


async def test_a_replay_goes_on_where_the_first_attempt_died() -> None:
    expected = await reference(PROMPT, 12, 2)
    for exact, shapes in ((True, [[32], [32], [6], [1], [1], [1]]), (False, [[32], [32], [9]])):
        async with pipeline([0], [1]) as stages:
            await begin(stages, [[0], [1]], PROMPT, 9, replay=expected[:3], attempt=1, exact=exact)
            tokens = [await stages[1].token() for _ in range(9)]
            assert [token.token for token in tokens] == expected[3:]
            assert [token.position for token in tokens] == list(range(73, 82))
            assert {token.attempt for token in tokens} == {1}
            assert stages[1].engine.shapes[: len(shapes)] == shapes
            await end(stages, attempt=1)


async def test_sampling_gets_the_position_of_the_token_that_it_draws() -> None:
    sampling = Sampling(temperature=0.5, seed=7)
    async with pipeline([0], [1]) as stages:
        await begin(stages, [[0], [1]], [1, 2, 3], 3, sampling=sampling)
        await drawn(stages[1], 3)
        assert stages[1].engine.sampled == [(3, sampling), (4, sampling), (5, sampling)]
        assert stages[0].engine.sampled == []
        await end(stages)


async def test_a_token_is_sent_on_before_it_is_reported() -> None:
    async with pipeline([0], [1]) as stages:
        await begin(stages, [[0], [1]], [1], 3)
        await drawn(stages[1], 3)
        log = [line for line in stages[0].network.log if not line.startswith("t1")]
        assert log == ["t0 s/0/0", "report 1", "t0 s/0/0", "report 2", "report 3"]
        await end(stages)


async def test_an_end_token_ends_it_and_nothing_is_sent_after_it() -> None:
    engines = [TinyEngine(2), TinyEngine(2, ends_at=5)]
    async with pipeline([0], [1], engines=engines) as stages:
        await begin(stages, [[0], [1]], [1, 2, 3], 10)
        tokens = [await stages[1].token() for _ in range(3)]
        assert [token.end for token in tokens] == [False, False, True]
        assert tokens[-1].token == END_TOKEN
        await asyncio.sleep(0.05)
        assert stages[1].events.empty()
        assert sum(line == "t0 s/0/0" for line in stages[0].network.log) == 2
        await end(stages)


async def test_sessions_that_are_ready_together_share_a_forward() -> None:
    engine = TinyEngine(1, seconds=0.002)
    async with pipeline([0], engines=[engine]) as [stage]:
        for name in ("a", "b", "c"):
            await begin([stage], [[0]], [ord(name) % 90, 4], 20, session=name)
        tokens = [await stage.token() for _ in range(60)]
        for name in ("a", "b", "c"):
            mine = [token.token for token in tokens if token.session == name]
            assert mine == await reference([ord(name) % 90, 4], 20, 1)
        assert [1, 1, 1] in engine.shapes
        assert len(engine.shapes) < 40
        for name in ("a", "b", "c"):
            await end([stage], session=name)


async def test_an_exact_session_is_computed_alone() -> None:
    engine = TinyEngine(1, seconds=0.002)
    async with pipeline([0], engines=[engine]) as [stage]:
        for name in ("a", "b"):
            await begin([stage], [[0]], [5, 4], 10, session=name, exact=True)
        for _ in range(20):
            await stage.token()
        assert {len(shapes) for shapes in engine.shapes} == {1}
        for name in ("a", "b"):
            await end([stage], session=name)


async def test_a_token_does_not_wait_in_a_batch_with_a_chunk() -> None:
    engine = TinyEngine(1, seconds=0.002)
    async with pipeline([0], engines=[engine]) as [stage]:
        await begin([stage], [[0]], [5], 30, session="a")
        await stage.token()
        await begin([stage], [[0]], PROMPT, 2, session="b")
        for _ in range(31):
            await stage.token()
        assert all(len(set(shapes)) == 1 for shapes in engine.shapes)
        for name in ("a", "b"):
            await end([stage], session=name)


async def refused(stage: Stage, order: Order) -> str:
    with pytest.raises(ShoalError) as caught:
        await stage.order(order)
    return caught.value.code


async def test_bounds_and_contradictions_are_refused() -> None:
    async with pipeline([0, 1], [2]) as [a, b]:
        assert await refused(a, Open(opening(0, 2, [0, 1], n_positions=257))) == "context_overflow"
        assert await refused(a, Open(opening(0, 2, [0, 1, 2]))) == "shard_not_loaded"
        assert await refused(a, Open(opening(0, 2, [1, 0]))) == "invalid_params"
        assert await refused(a, Open(opening(1, 2, [0, 1]))) == "invalid_params"
        assert await refused(a, Open(opening(0, 1, [0, 1]))) == "invalid_params"
        assert await refused(b, Open(opening(2, 2, [2]))) == "invalid_params"
        await a.order(Open(opening(0, 2, [0, 1])))
        assert await refused(a, Open(opening(0, 2, [0, 1]))) == "invalid_params"
        assert await refused(a, Unload(1)) == "shard_in_use"
        for n in range(3):
            await a.order(Open(opening(0, 2, [0, 1], session=f"more {n}")))
        assert await refused(a, Open(opening(0, 2, [0, 1], session="too many"))) == "busy"
        await a.order(Close(CloseSessionParams(session="s", stage=0)))
        await a.order(Open(opening(0, 2, [0, 1], session="now there is room")))
        condition: Condition = await a.order(Inspect())
        assert (condition.sessions, condition.shards) == (4, [0, 1])
        assert await refused(b, Start(StartSessionParams(session="?", stage=1, next_ticket="t0"))) == "invalid_params"
        assert await b.order(Close(CloseSessionParams(session="?", stage=1))) is None
        await b.order(Unload(2))
        assert await refused(b, Open(opening(1, 2, [2]))) == "shard_not_loaded"


async def test_a_session_that_is_closed_while_it_opens_is_not_left_open() -> None:
    async with pipeline([0]) as [stage]:
        opened = asyncio.create_task(stage.order(Open(opening(0, 1, [0]))))
        await asyncio.sleep(0)
        await stage.order(Close(CloseSessionParams(session="s", stage=0)))
        await opened
        assert (await stage.order(Inspect())).sessions == 0


async def test_positions_that_do_not_add_up_fail_the_session() -> None:
    async with pipeline([0]) as [stage]:
        await stage.order(Open(opening(0, 1, [0], n_positions=10)))
        start = StartSessionParams(session="s", stage=0, next_ticket="t0", tokens=int32([1, 2]), max_tokens=9)
        await stage.order(Start(start))
        assert (await stage.failure()).code == "invalid_params"


FRAMES = [
    (0, np.zeros(1, np.int32)),
    (0, np.zeros((1, 4), np.float32)),
    (0, np.zeros((33, 3), np.float32)),
    (0, np.zeros((0, 3), np.float32)),
    (0, np.zeros((1, 3, 1), np.float32)),
    (1, np.zeros((1, 3), np.float32)),
    (0, np.zeros((32, 3), np.float32)),
]


@pytest.mark.parametrize("frame", FRAMES)
async def test_a_frame_that_cannot_be_ends_its_session_and_no_other(frame: tuple[int, Any]) -> None:
    async with pipeline([0], [1]) as stages:
        await begin(stages, [[0], [1]], [3, 4], 10, session="good")
        await stages[1].order(Open(opening(1, 2, [1], n_positions=20)))
        await stages[1].order(Start(StartSessionParams(session="s", stage=1, next_ticket="t0", max_tokens=10)))
        await stages[0].endpoint.open_outlet("t1", channel_name("s", 0, 1), KEY).send(*frame)
        assert (await stages[1].failure()).code == "transport_error"
        expected = await reference([3, 4], 10, 2)
        while len(good := [token.token for token in stages[1].seen if token.session == "good"]) < 10:
            await stages[1].token("good")
        assert good == expected
        await end(stages, session="good")


async def test_more_positions_than_asked_for_are_not_run() -> None:
    async with pipeline([0], [1]) as stages:
        await stages[1].order(Open(opening(1, 2, [1], n_positions=20)))
        await stages[1].order(Start(StartSessionParams(session="s", stage=1, next_ticket="t0", max_tokens=10)))
        outlet = stages[0].endpoint.open_outlet("t1", channel_name("s", 0, 1), KEY)
        await outlet.send(0, np.zeros((9, 3), np.float32))
        await outlet.send(1, np.zeros((12, 3), np.float32))
        assert "opened for 20 positions" in (await stages[1].failure()).message
        assert stages[1].engine.shapes == [[9]]


async def test_an_engine_that_fails_is_reported_and_goes_on() -> None:
    engine = TinyEngine(1, seconds=0.001)
    async with pipeline([0], engines=[engine]) as [stage]:
        await begin([stage], [[0]], [3], 200)
        await stage.token()
        engine.broken = True
        assert (await stage.failure()).code == "engine_error"
        engine.broken = False
        assert (await stage.order(Inspect())).sessions == 0
        await begin([stage], [[0]], [3], 5)
        await drawn(stage, 5)
        await end([stage])


async def test_a_lost_neighbour_is_reported_from_both_sides() -> None:
    runs = [[0], [1], [2]]
    async with pipeline(*runs, engines=[TinyEngine(3, seconds=0.005) for _ in runs]) as stages:
        await begin(stages, runs, [3], 200)
        await stages[2].token()
        stages[0].network.kill("t1")
        assert (await stages[0].failure()).code == "peer_lost"
        assert (await stages[2].failure()).code == "peer_lost"
        await end(stages)


async def test_closing_in_the_middle_stops_the_work() -> None:
    engine = TinyEngine(1, seconds=0.005)
    async with pipeline([0], engines=[engine]) as [stage]:
        await begin([stage], [[0]], [3], 200)
        await stage.token()
        await end([stage])
        ran = len(engine.shapes)
        await asyncio.sleep(0.05)
        assert len(engine.shapes) == ran
        assert not engine.open


async def test_tokenize() -> None:
    async with pipeline([0], [1]) as [first, second]:
        answer: Tokens = await first.order(Tokenize(TokenizeParams(model=MODEL, prompt="ab")))
        assert np.frombuffer(answer.tokens, "<i4").tolist() == [1, 2 + 97 - 90, 2 + 98 - 90]
        chat = (ChatMessage(role="user", content="ab"),)
        answer = await first.order(Tokenize(TokenizeParams(model=MODEL, messages=chat)))
        assert np.frombuffer(answer.tokens, "<i4").tolist() == [9, 10], "a chat template writes its own BOS"
        assert await refused(first, Tokenize(TokenizeParams(model=MODEL))) == "invalid_params"
        assert await refused(second, Tokenize(TokenizeParams(model=MODEL, prompt="ab"))) == "shard_not_loaded"


async def test_a_session_of_short_steps_leaves_the_loop_to_others() -> None:
    async with pipeline([0]) as [stage]:
        seen: set[int] = set()

        def look() -> None:
            seen.add(len(stage.seen))
            if len(stage.seen) < 200:
                asyncio.get_running_loop().call_soon(look)

        await begin([stage], [[0]], [3], 200)
        look()
        await drawn(stage, 200)
        assert len(seen) > 50
        await end([stage])


async def test_a_long_forward_does_not_keep_the_loop() -> None:
    async with pipeline([0], engines=[TinyEngine(1, seconds=0.2)]) as [stage]:
        await begin([stage], [[0]], [3], 4)
        turns = 0
        while len(stage.seen) < 4:
            await asyncio.sleep(0.01)
            turns += 1
        assert turns > 10
        await end([stage])
