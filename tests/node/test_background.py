"""The error of a group is the one that came first, with its own type."""

from __future__ import annotations

import asyncio
import logging

import pytest

from node.background import Background, BoundedGroup, FirstErrorGroup


async def fail(error: Exception, after_s: float = 0.0) -> None:
    await asyncio.sleep(after_s)
    raise error


async def fail_when_cancelled(error: Exception) -> None:
    try:
        await asyncio.sleep(60)
    finally:
        raise error


async def test_a_task_that_fails_ends_the_block_and_is_raised_as_it_is() -> None:
    async def run() -> None:
        async with FirstErrorGroup() as group:
            group.create_task(fail(KeyError("task")))
            await asyncio.sleep(60)

    with pytest.raises(KeyError, match="task"):
        await run()


async def test_an_error_of_the_block_comes_out_though_a_task_fails_while_it_is_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run() -> None:
        async with FirstErrorGroup() as group:
            group.create_task(fail_when_cancelled(OSError("later")))
            await asyncio.sleep(0)
            raise KeyError("block")

    with pytest.raises(KeyError, match="block"):
        await run()
    assert "later" in caplog.text


async def test_a_task_that_failed_first_comes_out_though_the_block_fails_while_it_is_cancelled() -> None:
    async def run() -> None:
        async with FirstErrorGroup() as group:
            group.create_task(fail(OSError("first")))
            try:
                await asyncio.sleep(60)
            finally:
                raise KeyError("block")

    with pytest.raises(OSError, match="first"):
        await run()


async def test_the_first_of_two_tasks_comes_out_with_its_cause() -> None:
    async def caused() -> None:
        try:
            raise OSError("cause")
        except OSError as err:
            raise KeyError("effect") from err

    async def run() -> None:
        async with FirstErrorGroup() as group:
            group.create_task(fail_when_cancelled(OSError("later")))
            group.create_task(caused())

    with pytest.raises(KeyError, match="effect") as caught:
        await run()
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_cancelled_caller_stays_cancelled() -> None:
    async def work() -> None:
        async with FirstErrorGroup() as group:
            group.create_task(asyncio.sleep(60))
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_background_work_that_fails_is_logged_and_takes_nothing_along(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    async with Background.open() as background:
        background.start(fail(OSError("lost")), name="poll")
        await asyncio.sleep(0.01)
    assert "poll failed" in caplog.text


async def test_an_error_in_a_background_context_comes_out_as_it_is_and_its_work_ends() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def run() -> None:
        async with Background.open() as background:
            background.start(work(), name="work")
            await asyncio.sleep(0)
            raise KeyError("block")

    with pytest.raises(KeyError):
        await run()
    assert ended.is_set()


async def test_a_bounded_group_leaves_behind_and_names_a_task_that_does_not_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    go_on, ended = asyncio.Event(), asyncio.Event()

    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await go_on.wait()
            ended.set()

    async with BoundedGroup.open(0.05) as group:
        stuck = group.start(stubborn(), name="the stubborn task")
        failed = group.start(fail(KeyError("logged")), name="the failing task")
        well = group.start(asyncio.sleep(60), name="the obedient task")
        await asyncio.wait([failed])
    assert not stuck.done()
    assert well.cancelled()
    assert "the stubborn task does not end when cancelled" in caplog.text
    assert "the failing task failed" in caplog.text
    go_on.set()
    await asyncio.wait([stuck])
    assert ended.is_set()
