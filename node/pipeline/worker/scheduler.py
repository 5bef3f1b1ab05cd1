"""Runs engine calls one at a time, and decodes the steps of sessions in batches.

A step that is ready waits for one turn of the loop, so that steps that became ready together share one forward.
Engine calls run on a thread, so that a long prefill does not delay the loop's heartbeats; a forward that is expected
to be short runs on the loop. Measured for two stages pinned to a core each and an engine that takes
no time: handing a step to the thread and its result back costs 30 microseconds on an idle machine, and 0.27 ms a stage
and token on one with five times more work than cores (1.9 against 1.3 ms a token, transport included).
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from node.pipeline.engine.batch import Slot
from node.pipeline.engine.settings import PREFILL_CHUNK
from node.pipeline.worker.interfaces import ForwardEngine
from protocol.commands.tasks import Sampling

INLINE_S = 0.05
"""A forward that is expected to take less may run on the loop; heartbeats are ten times further apart."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ForwardStep:
    """The next tokens of one session, to be decoded with all shards of its stage."""

    shards: tuple[int, ...]
    slot: Slot
    alone: bool
    """Whether it must not share a batch with other sessions."""
    sampling: Sampling | None = None
    """How to sample a token from the last position's logits; None: no token is sampled."""
    wants_output: bool = True
    """Whether the hidden states are returned. False if only the KV cache is to be filled."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed."""

    hidden: NDArray[np.float32] | None
    """[n, n_embd], of a stage that is not the last."""
    token: int | None
    """The sampled token, of the last stage."""


def choose_batch(waiting: Sequence[ForwardStep], max_tokens: int = PREFILL_CHUNK) -> list[int]:
    """Which of the waiting steps share the next forward, as indices, oldest first.

    The oldest always runs. Others join it if they run the same shards with equally many tokens (so that a token never
    waits for another session's chunk), if none of them must be alone, and up to `max_tokens` in all.
    """
    first = waiting[0]
    n = len(first.slot.values)
    if first.alone:
        return [0]
    alike = (
        index
        for index, step in enumerate(waiting)
        if not step.alone and step.shards == first.shards and len(step.slot.values) == n
    )
    return list(itertools.islice(alike, max(1, max_tokens // n)))


class EngineThread:
    """Runs engine calls one at a time, in order; the steps of sessions in batches.

    An async context manager: leaving it ends the thread after the call in progress.
    """

    def __init__(self, engine: ForwardEngine, *, inline_s: float = INLINE_S) -> None:
        """A forward that is expected to take less than `inline_s` may run on the loop.

        With 0 the engine is only called from the thread: OpenMP keeps a team of threads for each thread that calls
        it, and a team that spins while it waits takes the other team's cores.
        """
        self._engine = engine
        self._inline_s = inline_s
        self._in_thread = 0
        self._seconds: dict[tuple[tuple[int, ...], int], float] = {}
        """By shards and number of tokens: a moving average of the seconds that a forward took."""
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._waiting: deque[tuple[ForwardStep, asyncio.Future[StepResult]]] = deque()
        self._running = False
        self._fresh_turn = True
        self._loop = asyncio.get_running_loop()
        self.sessions = 0
        """Open ones; the steps of a single session do not wait for others to join."""
        self.forwards = 0
        self.forward_s = 0.0
        """Seconds in forwards and in sampling."""

    async def __aenter__(self) -> EngineThread:
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    async def call(self, function: Callable[[ForwardEngine], T]) -> T:
        """Run one call on the thread. Cancelling the caller does not interrupt it."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._put(lambda: function(self._engine), lambda result, error: _settle(done, result, error))
        return await done

    async def step(self, step: ForwardStep) -> StepResult:
        """Run a step, in one forward with other ready ones. A step that is cancelled before it begins does not run."""
        size = _size([step])
        if self._fresh_turn and not self._running and (step.alone or self.sessions < 2) and self._is_short(size):
            # No other step can join. At most once a turn, or a session of short steps would block the loop.
            self._fresh_turn = False
            self._loop.call_soon(self._next_turn)
            return self._run_batch([step], size)[0]
        done: asyncio.Future[StepResult] = self._loop.create_future()
        self._waiting.append((step, done))
        if not self._running:
            self._running = True
            self._loop.call_soon(self._next_batch)
        return await done

    def _next_turn(self) -> None:
        self._fresh_turn = True

    def _next_batch(self) -> None:
        while self._waiting and self._waiting[0][1].done():
            self._waiting.popleft()
        if not self._waiting:
            self._running = False
            return
        ready = [(step, done) for step, done in self._waiting if not done.done()]
        chosen = set(choose_batch([step for step, _ in ready]))
        batch = [ready[index] for index in sorted(chosen)]
        self._waiting = deque(item for index, item in enumerate(ready) if index not in chosen)
        steps = [step for step, _ in batch]
        size = _size(steps)
        futures = [done for _, done in batch]
        if self._is_short(size):
            try:
                self._batch_done(futures, self._run_batch(steps, size), None)
            except Exception as err:  # raised in the sessions
                self._batch_done(futures, None, err)
        else:
            self._put(
                lambda: self._run_batch(steps, size),
                lambda results, error: self._batch_done(futures, results, error),
            )

    def _is_short(self, size: tuple[tuple[int, ...], int]) -> bool:
        """Whether a forward may run on the loop."""
        return self._in_thread == 0 and self._seconds.get(size, self._inline_s) < self._inline_s

    def _run_batch(self, steps: Sequence[ForwardStep], size: tuple[tuple[int, ...], int]) -> list[StepResult]:
        began = time.perf_counter()
        outputs = self._engine.forward(steps[0].shards, [step.slot for step in steps])
        results = [_step_result(self._engine, step, output) for step, output in zip(steps, outputs, strict=True)]
        took = time.perf_counter() - began
        self._seconds[size] = (self._seconds.get(size, took) + took) / 2
        self.forwards += 1
        self.forward_s += took
        return results

    def _batch_done(
        self,
        futures: Sequence[asyncio.Future[StepResult]],
        results: Sequence[StepResult] | None,
        error: Exception | None,
    ) -> None:
        for index, done in enumerate(futures):
            _settle(done, results[index] if results is not None else None, error)
        # After the sessions have seen their results: their next steps may be ready at once.
        self._loop.call_soon(self._next_batch)

    def _put(self, call: Callable[[], T], done: Callable[[T | None, Exception | None], None]) -> None:
        self._in_thread += 1

        def finish(result: T | None, error: Exception | None) -> None:
            self._in_thread -= 1
            done(result, error)

        def run() -> None:
            try:
                result, error = call(), None
            except Exception as err:  # raised in the caller
                result, error = None, err
            self._loop.call_soon_threadsafe(finish, result, error)

        self._calls.put(run)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except RuntimeError:
                return  # the loop is closed


def _size(steps: Sequence[ForwardStep]) -> tuple[tuple[int, ...], int]:
    """The shards and the number of tokens: the time of a forward depends on them."""
    return steps[0].shards, sum(len(step.slot.values) for step in steps)


def _step_result(engine: ForwardEngine, step: ForwardStep, output: NDArray[np.float32]) -> StepResult:
    if step.sampling is not None:
        return StepResult(None, engine.sample(output, step.sampling, step.slot.position + len(step.slot.values)))
    return StepResult(output if step.wants_output else None, None)


def _settle(done: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
