"""One session on one stage: receives activations, runs the stage's layers, sends the result to the next stage.

Stage 0 runs the prompt in chunks, then each token that the last stage sends to it. A stage in the middle runs frames in
the order in which they arrive. The last stage samples a token once it has seen the whole prompt (and the replayed
tokens), sends it to stage 0, and only then reports it, so that a report does not delay the next token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from node.pipeline.engine.batch import Slot
from node.pipeline.engine.loaded_shard import LoadedShard
from node.pipeline.engine.settings import PREFILL_CHUNK
from node.pipeline.worker.channels import Channels, StageInbox, channel_name
from node.pipeline.worker.interfaces import Activation, FrameSender, Tokenizer
from node.pipeline.worker.scheduler import EngineThread, ForwardStep, StepResult
from protocol.commands.sessions import OpenSessionParams, SessionToken, StartSessionParams
from protocol.errors import ContextOverflowError, InvalidParamsError, ShardNotLoadedError, TransportError


def check_session(params: OpenSessionParams, loaded: Mapping[int, LoadedShard], ctx_size: int) -> None:
    """Check that this stage can run a session, whose shards are among `loaded` and has `ctx_size` tokens of context.

    Raises ShardNotLoadedError, InvalidParamsError or ContextOverflowError if it cannot.
    """
    shards = list(params.shards)
    missing = [shard_id for shard_id in shards if shard_id not in loaded]
    if missing:
        raise ShardNotLoadedError(f"shards {missing} are not loaded here; LOAD_SHARD them first", {"shards": missing})
    if params.stage >= params.n_stages:
        raise InvalidParamsError(
            f"stage {params.stage} is not in a pipeline of {params.n_stages} stages; give 0 to {params.n_stages - 1}"
        )
    if shards != list(range(shards[0], shards[0] + len(shards))):
        raise InvalidParamsError(f"shards {shards} are not neighbours in ascending order, as those of a stage must be")
    ends = (loaded[shards[0]].is_first, loaded[shards[-1]].is_last)
    if ends != (params.stage == 0, params.stage == params.n_stages - 1):
        raise InvalidParamsError(
            f"shards {shards} cannot be stage {params.stage} of {params.n_stages}: the first stage begins with the "
            "model's first shard, the last ends with its last"
        )
    if params.n_positions > ctx_size:
        raise ContextOverflowError(
            f"prompt and answer take up to {params.n_positions} tokens, a stage here has room for {ctx_size}; shorten "
            "the prompt, lower max_tokens, or start the node with a larger --ctx-size",
            {"needed": params.n_positions, "ctx_size": ctx_size},
        )


class StageSession:
    """An open session: its sequence in the engine, its inbox, and its outlet to the next stage once it runs."""

    def __init__(
        self,
        params: OpenSessionParams,
        sequence: int,
        *,
        n_embd: int,
        tokenizer: Tokenizer | None,
        channels: Channels,
        engine: EngineThread,
        report: Callable[[SessionToken], None],
    ) -> None:
        """`tokenizer` is only used on the last stage; `report` gets each token that it samples."""
        self.params = params
        self.sequence = sequence
        self._n_embd, self._tokenizer = n_embd, tokenizer
        self._channels, self._engine, self._report = channels, engine, report
        self._first, self._last = params.stage == 0, params.stage == params.n_stages - 1
        name = channel_name(params.session, params.attempt, params.stage)
        self._inbox: StageInbox | None = None if params.n_stages == 1 else channels.open_inbox(name, params.key)
        self._outlet: FrameSender | None = None
        self._position = self._received = self._sent = self._sampled = 0
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
                f"max_tokens is {start.max_tokens}, but the session has {params.n_positions} positions, and the prompt "
                "needs at least one of them"
            )
        if params.n_stages > 1:
            following = (params.stage + 1) % params.n_stages
            name = channel_name(params.session, params.attempt, following)
            self._outlet = self._channels.open_outlet(start.next_ticket, name, params.key)
        if self._first:
            await self._prefill(start)
        while self._sampled < self._max_tokens:
            values = await self._next_values()
            if values is None:
                break
            await self._advance(values)

    def close(self) -> None:
        """Close the channels. The caller closes the engine's sequence."""
        if self._inbox is not None:
            self._inbox.close()
        if self._outlet is not None:
            self._outlet.close()

    async def _prefill(self, start: StartSessionParams) -> None:
        prompt, replay = _token_array(start.tokens, "tokens"), _token_array(start.replay, "replay")
        if len(prompt) + len(replay) != self._n_given:
            raise InvalidParamsError(
                f"{len(prompt)} prompt tokens, {len(replay)} replayed ones and max_tokens {start.max_tokens} do not "
                f"add up to the {self.params.n_positions} positions that the session was opened with"
            )
        if self.params.exact:
            # In the batch shapes of the first attempt: the prompt in chunks, the sampled tokens one by one.
            chunks = [*_chunks(prompt, PREFILL_CHUNK), *_chunks(replay, 1)]
        else:
            chunks = [*_chunks(np.concatenate((prompt, replay)), PREFILL_CHUNK)]
        for chunk in chunks:
            await self._advance(chunk)

    async def _next_values(self) -> Activation | None:
        if self._inbox is None:
            token, self._next_token = self._next_token, None
            return None if token is None else np.array([token], np.int32)
        frame = await self._inbox.receive()
        values = frame.tensor
        if frame.sequence != self._received:
            raise TransportError(f"frame {self._received} of session {self.params.session} is missing")
        self._received += 1
        kind, shape = ("int32", (1,)) if self._first else ("float32", (*values.shape[:1], self._n_embd))
        if values.dtype != kind or values.shape != shape or not 1 <= len(values) <= PREFILL_CHUNK:
            raise TransportError(
                f"stage {self.params.stage} takes {kind} {shape}, at most {PREFILL_CHUNK} long; it received "
                f"{values.dtype} {values.shape}"
            )
        return values

    async def _advance(self, values: Activation) -> None:
        params, position = self.params, self._position
        self._position += len(values)
        if self._position > params.n_positions:
            raise TransportError(f"session {params.session} was opened for {params.n_positions} positions, not more")
        samples = self._last and self._position >= self._n_given
        result = await self._engine.step(
            ForwardStep(
                shards=params.shards,
                slot=Slot(self.sequence, position, values, logits_for_last=samples),
                alone=params.exact,
                sampling=params.sampling if samples else None,
                wants_output=not self._last,
            )
        )
        if samples:
            await self._token_sampled(result)
        elif result.hidden is not None:
            await self._send(result.hidden)

    async def _token_sampled(self, result: StepResult) -> None:
        assert result.token is not None
        assert self._tokenizer is not None
        params, token = self.params, result.token
        self._sampled += 1
        end = self._tokenizer.is_end(token)
        if end:
            self._max_tokens = self._sampled
        if self._sampled < self._max_tokens:
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
                piece=self._tokenizer.piece(token),
                end=end,
            )
        )

    async def _send(self, values: Activation) -> None:
        """Returns once the frame is on its way, so that it travels while the next chunk is computed."""
        assert self._outlet is not None
        await self._outlet.send(self._sent, values)
        self._sent += 1


def _token_array(data: bytes, name: str) -> NDArray[np.int32]:
    if len(data) % 4:
        raise InvalidParamsError(f"{name} has {len(data)} bytes, it must be int32 values of 4 bytes each")
    return np.frombuffer(data, "<i4").astype(np.int32, copy=False)


def _chunks(tokens: NDArray[np.int32], size: int) -> Iterable[NDArray[np.int32]]:
    return (tokens[start : start + size] for start in range(0, len(tokens), size))
