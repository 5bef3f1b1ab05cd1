"""Stages as engine processes: the same tokens as the whole model, and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from node.pipeline.driver.attempt import DriverSettings
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
from protocol.errors import ContextOverflowError, EngineError, InvalidShardError, ShardNotLoadedError, StageLostError
from tests.support.pipeline.nodes import (
    Cluster,
    Slices,
    StageNode,
    WholeModel,
    arranged,
    read_slices,
    stage_node,
    stage_nodes,
)
from tests.support.waiting import OwnPauses

pytestmark = pytest.mark.asyncio(loop_scope="module")
LONG = "Once upon a time, in a land far away, there lived a curious fox who counted every star. " * 2


@pytest.fixture(scope="module")
def slices(small_shards: Path) -> Slices:
    return read_slices(small_shards)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosts() -> AsyncIterator[list[StageNode]]:
    """Three nodes for all tests: an engine process takes a second to start, and its transport another to connect."""
    async with stage_nodes(3) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def whole(six_layers: Path) -> Iterator[WholeModel]:
    model = WholeModel(six_layers)
    yield model
    model.close()


@pytest.mark.parametrize("runs", [pytest.param([[0], [1, 2]], marks=pytest.mark.slow), [[0], [1], [2]]])
async def test_stages_draw_the_tokens_of_the_whole_model(
    slices: Slices, hosts: list[StageNode], whole: WholeModel, runs: list[list[int]]
) -> None:
    async with arranged(slices, hosts, runs) as nodes:
        for prompt in ("The capital of France is", LONG):
            generation = nodes.generation(prompt, 16)
            assert [token.token async for token in generation.tokens()] == whole.generate(prompt, 16)
            assert generation.attempts == 1
            assert [list(stage.shards) for stage in generation.plan.stages] == runs
            assert generation.prompt_tokens == len(whole.tokenizer.tokenize(prompt))
        drawn = Sampling(temperature=0.8, top_p=0.95, seed=11)
        assert await nodes.generate("Tell me", 8, sampling=drawn) == whole.generate("Tell me", 8, drawn)
        figures = [(await node.stages.status()) for node in nodes.nodes.values()]
        assert all(status.sessions == 0 for [status], _ in figures)
        assert all(transport.sent_frames and transport.received_frames for _, transport in figures)


async def opened(nodes: Cluster, max_tokens: int) -> tuple[asyncio.Queue[SessionToken | SessionFailed], list[str]]:
    """A session over all nodes, driven by hand; returns what it reports."""
    events: asyncio.Queue[SessionToken | SessionFailed] = asyncio.Queue()
    stages = [node.stages for node in nodes.nodes.values()]
    digest, n_slices = nodes.slices.digest, len(stages)
    tokens = await stages[0].tokenize(TokenizeParams(model=digest, prompt="One, two, three"))
    tickets = [
        (
            await stage.open_session(
                OpenSessionParams(
                    session="s",
                    key=b"k" * 32,
                    model=digest,
                    stage=number,
                    n_stages=n_slices,
                    shards=tuple(sorted(stage.loaded(digest))),
                    n_positions=len(tokens) // 4 + max_tokens,
                ),
                events.put_nowait,
            )
        ).ticket
        for number, stage in enumerate(stages)
    ]
    for number in reversed(range(n_slices)):
        await stages[number].start_session(
            StartSessionParams(
                session="s",
                stage=number,
                next_ticket=tickets[(number + 1) % n_slices],
                tokens=tokens if number == 0 else b"",
                max_tokens=max_tokens,
            )
        )
    return events, tickets


async def test_a_killed_stage_is_noticed_and_the_node_goes_on(slices: Slices, hosts: list[StageNode]) -> None:
    async with arranged(slices, hosts, [[0], [1], [2]]) as nodes, OwnPauses.watched() as pauses:
        first, middle, last = nodes.nodes.values()
        events, _ = await opened(nodes, 200)
        for _ in range(5):
            assert isinstance(await asyncio.wait_for(events.get(), 10), SessionToken)
        os.kill(await middle.engine_pid(), signal.SIGKILL)
        killed, paused_before = time.monotonic(), pauses.seconds
        failures: dict[int, str] = {}
        while len(failures) < 3:
            event = await asyncio.wait_for(events.get(), 10)
            if isinstance(event, SessionFailed):
                if not failures:
                    assert time.monotonic() - killed < 3 + pauses.seconds - paused_before
                failures[event.stage] = event.error["code"]
        # Of the two neighbours one may see first that the other gave up.
        assert failures.pop(1) == "stage_lost"
        assert "peer_lost" in failures.values()
        assert set(failures.values()) <= {"peer_lost", "transport_error"}
        assert middle.died == [frozenset({1})]
        assert middle.stages.loaded(slices.digest) == frozenset()
        assert (await middle.stages.status())[0] == []
        with pytest.raises(ShardNotLoadedError):
            await middle.stages.tokenize(TokenizeParams(model=slices.digest, prompt="x"))
        await middle.load(slices, [1])
        for node in (first, last):
            await node.stages.close_session(CloseSessionParams(session="s", stage=0))
        assert len(await nodes.generate("One, two", 4)) == 4


async def test_two_sessions_at_once(slices: Slices, hosts: list[StageNode], whole: WholeModel) -> None:
    async with arranged(slices, hosts, [[0], [1, 2]]) as nodes:
        prompts = ["The capital of France is", LONG]
        both = await asyncio.gather(*(nodes.generate(prompt, 16) for prompt in prompts))
        assert both == [whole.generate(prompt, 16) for prompt in prompts]


async def test_what_does_not_fit_the_context_is_refused_before_anything_runs(
    slices: Slices, hosts: list[StageNode]
) -> None:
    async with arranged(slices, hosts, [[0], [1, 2]]) as nodes:
        with pytest.raises(ContextOverflowError, match="room for 256"):
            await nodes.generate("Hello", 300)
        assert len(nodes.plans) == 1
        with pytest.raises(ContextOverflowError, match="here has 2048"):
            await nodes.generate("Hello", 3000)
        for node in nodes.nodes.values():
            assert (await node.stages.status())[0][0].sessions == 0


async def test_a_driver_that_leaves_early_or_dies_leaves_nothing_running(
    slices: Slices, hosts: list[StageNode]
) -> None:
    async with arranged(slices, hosts, [[0], [1, 2]]) as nodes:

        async def sessions() -> list[int]:
            return [(await node.stages.status())[0][0].sessions for node in nodes.nodes.values()]

        async with contextlib.aclosing(nodes.generation("Hello", 200).tokens()) as tokens:
            async for _ in tokens:
                break
        assert await sessions() == [0, 0]

        async def drive() -> None:
            async for _ in nodes.generation("Hello", 200).tokens():
                begun.set()

        begun = asyncio.Event()
        driving = asyncio.create_task(drive())
        await begun.wait()
        driving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await driving
        for _ in range(100):
            if await sessions() == [0, 0]:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(await sessions())


async def test_a_stage_that_hangs_is_noticed_by_its_neighbours(slices: Slices, hosts: list[StageNode]) -> None:
    async with arranged(slices, hosts, [[0], [1, 2]]) as nodes:
        events, _ = await opened(nodes, 200)
        assert isinstance(await asyncio.wait_for(events.get(), 10), SessionToken)
        pid = await list(nodes.nodes.values())[1].engine_pid()
        os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        try:
            while not isinstance(event := await asyncio.wait_for(events.get(), 10), SessionFailed):
                pass
            assert time.monotonic() - stopped < 5  # 3 s where the machine is not overloaded
            assert (event.stage, event.error["code"]) == (0, "peer_lost")
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("exact", [True, pytest.param(False, marks=pytest.mark.slow)])
async def test_a_generation_survives_the_death_of_a_stage(
    slices: Slices, hosts: list[StageNode], whole: WholeModel, exact: bool
) -> None:
    async with arranged(slices, hosts, [[0], [1, 2]]) as nodes:
        generation = nodes.generation(LONG, 24, exact=exact)
        _, last = nodes.nodes.values()
        found: list[int] = []
        async with contextlib.aclosing(generation.tokens()) as tokens:
            async for token in tokens:
                found.append(token.token)
                if len(found) == 8:
                    os.kill(await last.engine_pid(), signal.SIGKILL)
        assert generation.attempts == 2
        assert found == whole.generate(LONG, 24)


async def test_one_node_alone_and_a_chat(slices: Slices, hosts: list[StageNode], whole: WholeModel) -> None:
    async with arranged(slices, hosts, [[0, 1, 2]]) as nodes:
        assert await nodes.generate(LONG, 8) == whole.generate(LONG, 8)
        [node] = nodes.nodes.values()
        messages = (ChatMessage(role="user", content="Hi"),)
        tokens = await node.stages.tokenize(TokenizeParams(model=slices.digest, messages=messages))
        ids = [int.from_bytes(tokens[n : n + 4], "little") for n in range(0, len(tokens), 4)]
        assert ids[0] == 1, "<|im_start|> is one token"
        text = b"".join(map(whole.tokenizer.piece, ids)).decode()
        assert text.endswith("user\nHi\nassistant\n")


async def test_when_no_attempt_works_it_says_so(slices: Slices, hosts: list[StageNode]) -> None:
    async with arranged(slices, hosts, [[0, 1, 2]]) as nodes:
        [node] = nodes.nodes.values()

        async def unlucky() -> None:
            async for _ in nodes.generation("Hello", 200, settings=DriverSettings(lost_node_timeout_s=0.01)).tokens():
                for status in (await node.stages.status())[0]:  # none, while tokens of a dead one still come
                    os.kill(status.pid, signal.SIGKILL)

        with pytest.raises(StageLostError, match="broke 3 times"):
            await unlucky()


async def test_a_bad_file_is_refused_and_a_good_one_loads_after_it(slices: Slices, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(slices.path(0).read_bytes()[:200_000])
    async with stage_node("0" * 64) as node:
        with pytest.raises((InvalidShardError, EngineError)):
            await node.stages.load(slices.digest, 0, bad)
        with pytest.raises(ShardNotLoadedError):
            await node.stages.unload(slices.digest, 0)
        await node.load(slices, [0, 1])
        pid = await node.engine_pid()
        await node.stages.unload(slices.digest, 0)
        assert await node.engine_pid() == pid
        started = time.monotonic()
        await node.stages.unload(slices.digest, 1)
        assert time.monotonic() - started < 3
        assert not psutil.pid_exists(pid)
        await node.load(slices, [2])
        assert await node.engine_pid() != pid


DAEMON = """
import asyncio, sys
from pathlib import Path
from node.pipeline.stage.process import StageSettings
from node.pipeline.engine.settings import EngineSettings
from node.pipeline.stage.stages import Stages

async def main():
    async with Stages.open(StageSettings(EngineSettings(ctx_size=256, max_sessions=1))) as stages:
        await stages.load("0" * 64, 0, Path(sys.argv[1]))
        [status], _ = await stages.status()
        print(status.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_the_engine_process_ends_with_its_daemon_and_prints_nothing_to_stdout(slices: Slices) -> None:
    daemon = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        DAEMON,
        str(slices.path(1)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert daemon.stdout is not None
    pid = int(await daemon.stdout.readline())
    engine = psutil.Process(pid)
    daemon.kill()
    assert await daemon.stdout.read() == b""
    await daemon.wait()
    await asyncio.to_thread(engine.wait, timeout=10)
