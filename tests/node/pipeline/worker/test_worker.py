"""Sessions over stages: order, shapes, batches. Scheduling only: small engine, memory transport."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from node.pipeline.stage.ipc import (
    PromptTokens,
    TokenizeRequest,
)
from node.pipeline.worker.channels import channel_name
from protocol.commands.common import ChatMessage
from protocol.commands.sessions import (
    TokenizeParams,
)
from protocol.commands.tasks import Sampling
from tests.support.pipeline.parts import END_TOKEN, TinyEngine
from tests.support.pipeline.stages import MODEL, PROMPT, begin, drawn, end, pipeline, reference, refused


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


async def test_tokenize() -> None:
    async with pipeline([0], [1]) as [first, second]:
        answer: PromptTokens = await first.request(TokenizeRequest(TokenizeParams(model=MODEL, prompt="ab")))
        assert np.frombuffer(answer.tokens, "<i4").tolist() == [1, 2 + 97 - 90, 2 + 98 - 90]
        chat = (ChatMessage(role="user", content="ab"),)
        answer = await first.request(TokenizeRequest(TokenizeParams(model=MODEL, messages=chat)))
        assert np.frombuffer(answer.tokens, "<i4").tolist() == [9, 10], "a chat template writes its own BOS"
        assert await refused(first, TokenizeRequest(TokenizeParams(model=MODEL))) == "invalid_params"
        assert await refused(second, TokenizeRequest(TokenizeParams(model=MODEL, prompt="ab"))) == "shard_not_loaded"


async def test_a_session_of_short_steps_leaves_the_loop_to_others() -> None:
    async with pipeline([0]) as [stage]:
        seen: set[int] = set()

        def look() -> None:
            seen.add(len(stage.seen))
            if len(stage.seen) < 200:
                asyncio.get_running_loop().call_soon(look)

        await begin([stage], [[0]], [3], 3, session="so that its steps are known to be short")
        await drawn(stage, 3)
        await end([stage], session="so that its steps are known to be short")
        stage.seen.clear()
        await begin([stage], [[0]], [3], 200)
        look()
        await drawn(stage, 200)
        assert len(seen) > 50
        await end([stage])


async def test_a_long_forward_does_not_keep_the_loop() -> None:
    async with pipeline([0], engines=[TinyEngine(1, seconds=0.1)]) as [stage]:
        await begin([stage], [[0]], [3], 4)
        turns = 0
        while len(stage.seen) < 4:
            await asyncio.sleep(0.002)
            turns += 1
        assert turns > 10
        await end([stage])
