"""Sessions over stages: bounds, contradictions, failures. Scheduling only: small engine, memory transport."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from node.pipeline.stage.ipc import (
    CloseRequest,
    EngineStatus,
    OpenRequest,
    StartRequest,
    StatusRequest,
    UnloadRequest,
)
from node.pipeline.worker.channels import channel_name
from protocol.commands.sessions import (
    CloseSessionParams,
    StartSessionParams,
)
from tests.support.pipeline.parts import TinyEngine
from tests.support.pipeline.stages import KEY, begin, drawn, end, int32, opening, pipeline, reference, refused


async def test_bounds_and_contradictions_are_refused() -> None:
    async with pipeline([0, 1], [2]) as [a, b]:
        assert await refused(a, OpenRequest(opening(0, 2, [0, 1], n_positions=257))) == "context_overflow"
        assert await refused(a, OpenRequest(opening(0, 2, [0, 1, 2]))) == "shard_not_loaded"
        assert await refused(a, OpenRequest(opening(0, 2, [1, 0]))) == "invalid_params"
        assert await refused(a, OpenRequest(opening(1, 2, [0, 1]))) == "invalid_params"
        assert await refused(a, OpenRequest(opening(0, 1, [0, 1]))) == "invalid_params"
        assert await refused(b, OpenRequest(opening(2, 2, [2]))) == "invalid_params"
        await a.request(OpenRequest(opening(0, 2, [0, 1])))
        assert await refused(a, OpenRequest(opening(0, 2, [0, 1]))) == "invalid_params"
        assert await refused(a, UnloadRequest(1)) == "shard_in_use"
        for n in range(3):
            await a.request(OpenRequest(opening(0, 2, [0, 1], session=f"more {n}")))
        assert await refused(a, OpenRequest(opening(0, 2, [0, 1], session="too many"))) == "busy"
        await a.request(CloseRequest(CloseSessionParams(session="s", stage=0)))
        await a.request(OpenRequest(opening(0, 2, [0, 1], session="now there is room")))
        status: EngineStatus = await a.request(StatusRequest())
        assert (status.sessions, status.shards) == (4, [0, 1])
        assert (
            await refused(b, StartRequest(StartSessionParams(session="?", stage=1, next_ticket="t0")))
            == "invalid_params"
        )
        assert await b.request(CloseRequest(CloseSessionParams(session="?", stage=1))) is None
        await b.request(UnloadRequest(2))
        assert await refused(b, OpenRequest(opening(1, 2, [2]))) == "shard_not_loaded"


async def test_a_session_that_is_closed_while_it_opens_is_not_left_open() -> None:
    async with pipeline([0]) as [stage]:
        opened = asyncio.create_task(stage.request(OpenRequest(opening(0, 1, [0]))))
        await asyncio.sleep(0)
        await stage.request(CloseRequest(CloseSessionParams(session="s", stage=0)))
        await opened
        assert (await stage.request(StatusRequest())).sessions == 0


async def test_positions_that_do_not_add_up_fail_the_session() -> None:
    async with pipeline([0]) as [stage]:
        await stage.request(OpenRequest(opening(0, 1, [0], n_positions=10)))
        start = StartSessionParams(session="s", stage=0, next_ticket="t0", tokens=int32([1, 2]), max_tokens=9)
        await stage.request(StartRequest(start))
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
        await stages[1].request(OpenRequest(opening(1, 2, [1], n_positions=20)))
        await stages[1].request(StartRequest(StartSessionParams(session="s", stage=1, next_ticket="t0", max_tokens=10)))
        await stages[0].endpoint.open_outlet("t1", channel_name("s", 0, 1), KEY).send(*frame)
        assert (await stages[1].failure()).code == "transport_error"
        expected = await reference([3, 4], 10, 2)
        while len(good := [token.token for token in stages[1].seen if token.session == "good"]) < 10:
            await stages[1].token("good")
        assert good == expected
        await end(stages, session="good")


async def test_more_positions_than_asked_for_are_not_run() -> None:
    async with pipeline([0], [1]) as stages:
        await stages[1].request(OpenRequest(opening(1, 2, [1], n_positions=20)))
        await stages[1].request(StartRequest(StartSessionParams(session="s", stage=1, next_ticket="t0", max_tokens=10)))
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
        assert (await stage.request(StatusRequest())).sessions == 0
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
