"""Who calls the engine and when, and which sessions' steps go into one forward.

A step that becomes ready waits for one turn of the loop, so that steps that became ready together run together.
Engine calls run one at a time: on a thread, where a long prefill does not keep the loop from its heartbeats, or, if
they are known to be short, on the loop itself. Measured for two stages pinned to a core each and an engine that takes
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
from node.pipeline.worker.interfaces import EngineLike
from protocol.commands.tasks import Sampling

INLINE_S = 0.05
"""A forward that is expected to take less may run on the loop; heartbeats are ten times further apart."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step:
    """The next tokens of one session, through all shards of its stage."""

    shards: tuple[int, ...]
    slot: Slot
    alone: bool
    """Never in a batch with others."""
    sampling: Sampling | None = None
    """Where a token is to be drawn from the last position's logits."""
    wants_output: bool = True
    """False where neither hidden states nor a token are needed, only the cache."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step gave."""

    hidden: NDArray[np.float32] | None
    """[n, n_embd], of a stage that is not the last."""
    token: int | None
    """The token drawn, of one that is."""


def choose(waiting: Sequence[Step], max_tokens: int = PREFILL_CHUNK) -> list[int]:
    """Which of the waiting steps go into the next forward, oldest first, as indices.

    The oldest always goes. Others join it if they run the same shards with as many tokens (so that a token never
    waits for another session's chunk), if none of them wants to be alone, and while they fit `max_tokens`.
    """
    first = waiting[0]
    n = len(first.slot.values)
    if first.alone:
        return [0]
    like = (
        index
        for index, step in enumerate(waiting)
        if not step.alone and step.shards == first.shards and len(step.slot.values) == n
    )
    return list(itertools.islice(like, max(1, max_tokens // n)))


class EngineThread:
    """Runs engine calls one at a time, in order; the steps of sessions in batches.

    An async context manager: leaving it ends the thread after the call in progress.
    """

    def __init__(self, engine: EngineLike, *, inline_s: float = INLINE_S) -> None:
        """`inline_s` is 0 where the engine must only be called from the thread: OpenMP keeps a team of threads for
        each thread that calls it, and one team that spins while it waits takes the other's cores.
        """
        self._engine = engine
        self._inline_s = inline_s
        self._in_thread = 0
        self._seconds: dict[tuple[tuple[int, ...], int], float] = {}
        """What a forward of so many tokens took of late."""
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._waiting: deque[tuple[Step, asyncio.Future[Outcome]]] = deque()
        self._running = False
        self._fresh_turn = True
        self._loop = asyncio.get_running_loop()
        self.sessions = 0
        """Open ones; where there is one, its steps wait for no others."""
        self.forwards = 0
        self.forward_s = 0.0
        """Seconds in forwards, drawing of tokens included."""

    async def __aenter__(self) -> EngineThread:
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    async def call(self, function: Callable[[EngineLike], T]) -> T:
        """Run one call; it is not interrupted where the caller is cancelled."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._put(lambda: function(self._engine), lambda result, error: _settle(done, result, error))
        return await done

    async def step(self, step: Step) -> Outcome:
        """Run a step with whatever else is ready. A cancelled one that has not begun never runs."""
        size = _size([step])
        if self._fresh_turn and not self._running and (step.alone or self.sessions < 2) and self._is_short(size):
            # Nobody to wait for. Once a turn: a session that never has to wait must not keep the loop to itself.
            self._fresh_turn = False
            self._loop.call_soon(self._next_turn)
            return self._run_batch([step], size)[0]
        done: asyncio.Future[Outcome] = self._loop.create_future()
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
        chosen = set(choose([step for step, _ in ready]))
        batch = [ready[index] for index in sorted(chosen)]
        self._waiting = deque(item for index, item in enumerate(ready) if index not in chosen)
        steps = [step for step, _ in batch]
        size = _size(steps)
        futures = [done for _, done in batch]
        if self._is_short(size):
            try:
                self._batch_done(futures, self._run_batch(steps, size), None)
            except Exception as err:  # goes to the sessions
                self._batch_done(futures, None, err)
        else:
            self._put(
                lambda: self._run_batch(steps, size),
                lambda outcomes, error: self._batch_done(futures, outcomes, error),
            )

    def _is_short(self, size: tuple[tuple[int, ...], int]) -> bool:
        """Whether a forward may run on the loop."""
        return self._in_thread == 0 and self._seconds.get(size, self._inline_s) < self._inline_s

    def _run_batch(self, steps: Sequence[Step], size: tuple[tuple[int, ...], int]) -> list[Outcome]:
        began = time.perf_counter()
        outputs = self._engine.forward(steps[0].shards, [step.slot for step in steps])
        outcomes = [_outcome(self._engine, step, output) for step, output in zip(steps, outputs, strict=True)]
        took = time.perf_counter() - began
        self._seconds[size] = (self._seconds.get(size, took) + took) / 2
        self.forwards += 1
        self.forward_s += took
        return outcomes

    def _batch_done(
        self, futures: Sequence[asyncio.Future[Outcome]], outcomes: Sequence[Outcome] | None, error: Exception | None
    ) -> None:
        for index, done in enumerate(futures):
            _settle(done, outcomes[index] if outcomes is not None else None, error)
        # After the sessions that now have a result, which may be ready for their next step at once.
        self._loop.call_soon(self._next_batch)

    def _put(self, call: Callable[[], T], done: Callable[[T | None, Exception | None], None]) -> None:
        self._in_thread += 1

        def finish(result: T | None, error: Exception | None) -> None:
            self._in_thread -= 1
            done(result, error)

        def run() -> None:
            try:
                result, error = call(), None
            except Exception as err:  # goes to whoever waits for it
                result, error = None, err
            self._loop.call_soon_threadsafe(finish, result, error)

        self._calls.put(run)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except RuntimeError:
                return  # the loop is closed: nobody waits any more


def _size(steps: Sequence[Step]) -> tuple[tuple[int, ...], int]:
    """What the time of a forward depends on."""
    return steps[0].shards, sum(len(step.slot.values) for step in steps)


def _outcome(engine: EngineLike, step: Step, output: NDArray[np.float32]) -> Outcome:
    if step.sampling is not None:
        return Outcome(None, engine.sample(output, step.sampling, step.slot.position + len(step.slot.values)))
    return Outcome(output if step.wants_output else None, None)


def _settle(done: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
