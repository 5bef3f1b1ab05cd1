"""One session on one stage: takes what comes, runs it, sends on what comes out.

Stage 0 runs the prompt in chunks, then each token that the last stage sends it. A stage in between runs frames as
they come. The last stage draws a token once the whole prompt (and what is replayed) went through, sends it to
stage 0, and only then reports it, so that no report delays the next token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from node.pipeline.engine.batch import Slot
from node.pipeline.engine.settings import PREFILL_CHUNK
from node.pipeline.worker.channels import Channels, Inbox, channel_name
from node.pipeline.worker.interfaces import Array, OutletLike, Words
from node.pipeline.worker.scheduler import EngineThread, Outcome, Step
from protocol.commands.sessions import OpenSessionParams, SessionToken, StartSessionParams
from protocol.errors import InvalidParamsError, TransportError

SessionId = tuple[str, int, int]
"""(session, attempt, stage)."""


class StageSession:
    """Holds an engine sequence and an inbox from OPEN_SESSION until it is closed."""

    def __init__(
        self,
        params: OpenSessionParams,
        sequence: int,
        *,
        width: int,
        words: Words | None,
        channels: Channels,
        engine: EngineThread,
        report: Callable[[SessionToken], None],
    ) -> None:
        """`width` is n_embd, `words` the vocabulary of the last stage."""
        self.params = params
        self.sequence = sequence
        self._width, self._words = width, words
        self._channels, self._engine, self._report = channels, engine, report
        self._first, self._last = params.stage == 0, params.stage == params.n_stages - 1
        name = channel_name(params.session, params.attempt, params.stage)
        self._inbox: Inbox | None = None if params.n_stages == 1 else channels.open_inbox(name, params.key)
        self._outlet: OutletLike | None = None
        self._position = self._received = self._sent = self._drawn = 0
        self._max_tokens = self._n_given = 0
        self._next_token: int | None = None

    async def run(self, start: StartSessionParams) -> None:
        """Serve until the answer is complete (the last stage) or cancelled (the others).

        Raises the error that ends the session: PeerLostError, TransportError, EngineError, InvalidParamsError.
        """
        params = self.params
        self._max_tokens = start.max_tokens
        self._n_given = params.n_positions - start.max_tokens
        if self._n_given < 1:
            raise InvalidParamsError(
                f"{start.max_tokens} tokens are to be drawn in {params.n_positions} positions, which leaves no prompt"
            )
        if params.n_stages > 1:
            following = (params.stage + 1) % params.n_stages
            name = channel_name(params.session, params.attempt, following)
            self._outlet = self._channels.open_outlet(start.next_ticket, name, params.key)
        if self._first:
            await self._prefill(start)
        while self._drawn < self._max_tokens:
            values = await self._next_values()
            if values is None:
                break
            await self._advance(values)

    def close(self) -> None:
        """Let go of the channels; the engine's sequence is the caller's."""
        if self._inbox is not None:
            self._inbox.close()
        if self._outlet is not None:
            self._outlet.close()

    async def _prefill(self, start: StartSessionParams) -> None:
        prompt, replay = _token_array(start.tokens, "tokens"), _token_array(start.replay, "replay")
        if len(prompt) + len(replay) != self._n_given:
            raise InvalidParamsError(
                f"{len(prompt)} prompt tokens, {len(replay)} replayed and {start.max_tokens} to draw do not make the "
                f"{self.params.n_positions} positions that the session was opened with"
            )
        if self.params.exact:
            # In the shapes of the first time: the prompt in chunks, what was drawn one by one.
            runs = [*_chunks(prompt, PREFILL_CHUNK), *_chunks(replay, 1)]
        else:
            runs = [*_chunks(np.concatenate((prompt, replay)), PREFILL_CHUNK)]
        for run in runs:
            await self._advance(run)

    async def _next_values(self) -> Array | None:
        if self._inbox is None:
            token, self._next_token = self._next_token, None
            return None if token is None else np.array([token], np.int32)
        frame = await self._inbox.receive()
        values = frame.tensor
        if frame.sequence != self._received:
            raise TransportError(f"frame {self._received} of session {self.params.session} is missing")
        self._received += 1
        kind, shape = ("int32", (1,)) if self._first else ("float32", (*values.shape[:1], self._width))
        if values.dtype != kind or values.shape != shape or not 1 <= len(values) <= PREFILL_CHUNK:
            raise TransportError(
                f"stage {self.params.stage} takes {kind} {shape}, at most {PREFILL_CHUNK} long; it was sent "
                f"{values.dtype} {values.shape}"
            )
        return values

    async def _advance(self, values: Array) -> None:
        params, position = self.params, self._position
        self._position += len(values)
        if self._position > params.n_positions:
            raise TransportError(f"session {params.session} was opened for {params.n_positions} positions, not more")
        drawing = self._last and self._position >= self._n_given
        outcome = await self._engine.step(
            Step(
                shards=params.shards,
                slot=Slot(self.sequence, position, values, logits_for_last=drawing),
                alone=params.exact,
                sampling=params.sampling if drawing else None,
                wants_output=not self._last,
            )
        )
        if drawing:
            await self._drew(outcome)
        elif outcome.hidden is not None:
            await self._send(outcome.hidden)

    async def _drew(self, outcome: Outcome) -> None:
        assert outcome.token is not None
        assert self._words is not None
        params, token = self.params, outcome.token
        self._drawn += 1
        end = self._words.is_end(token)
        if end:
            self._max_tokens = self._drawn
        if self._drawn < self._max_tokens:
            if self._outlet is None:
                self._next_token = token
            else:
                await self._send(np.array([token], np.int32))
        self._report(
            SessionToken(
                session=params.session,
                attempt=params.attempt,
                position=self._position,
                token=token,
                piece=self._words.piece(token),
                end=end,
            )
        )

    async def _send(self, values: Array) -> None:
        """Returns when it left: then it travels while the next chunk is computed. The transport bounds the window."""
        assert self._outlet is not None
        await self._outlet.send(self._sent, values)
        self._sent += 1


def _token_array(data: bytes, name: str) -> NDArray[np.int32]:
    if len(data) % 4:
        raise InvalidParamsError(f"{name} has {len(data)} bytes, which is no number of int32")
    return np.frombuffer(data, "<i4").astype(np.int32, copy=False)


def _chunks(tokens: NDArray[np.int32], size: int) -> Iterable[NDArray[np.int32]]:
    return (tokens[start : start + size] for start in range(0, len(tokens), size))
