"""The driver of one generation: opens a session on the nodes of a plan, and gives out tokens as they are drawn.

When a stage is lost, it plans again and has the tokens so far replayed on the new stages, so that the stream goes
on with no token lost or doubled. It speaks to nodes through connections that it is given, one for each node and
attempt: a node closes the sessions of a connection that is lost, so a driver that dies leaves nothing running.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from node.pipeline.driver.attempt import Attempt, AttemptLostError, Connect, GeneratedToken, GenerationRequest
from node.pipeline.driver.plan import Plan
from protocol.errors import ContextOverflowError, InvalidParamsError, StageLostError
from protocol.ids import NodeId

__all__ = ["MAX_ATTEMPTS", "Connect", "GeneratedToken", "Generation", "GenerationRequest", "MakePlan"]

MAX_ATTEMPTS = 3
MakePlan = Callable[[frozenset[NodeId]], Awaitable[Plan]]
"""Plans without the nodes that were lost, and returns when every shard of the plan is loaded."""
_log = logging.getLogger(__name__)


@dataclass
class Generation:
    """Iterate `tokens()` once; the other fields tell how it went."""

    request: GenerationRequest
    make_plan: MakePlan
    connect: Connect
    plan: Plan | None = None
    """Of the last attempt."""
    attempts: int = 0
    prompt_tokens: int = 0
    session: str = field(default_factory=lambda: secrets.token_hex(8))
    _prompt: bytes | None = None
    _drawn: list[int] = field(default_factory=list)

    async def tokens(self) -> AsyncGenerator[GeneratedToken, None]:
        """Yield the tokens of the answer, at most `max_tokens`.

        Close it (`contextlib.aclosing`) where it may be left early. Raises ContextOverflowError before anything
        runs, StageLostError after three attempts, and what planning, tokenizing and opening raise.
        """
        lost: set[NodeId] = set()
        while True:
            attempt = self.attempts
            self.attempts += 1
            self.plan = None
            try:
                self.plan = await self.make_plan(frozenset(lost))
                async with Attempt(self.session, attempt, self.request, self.plan, self.connect) as running:
                    try:
                        await self._begin(running)
                        while True:
                            token = await running.next_token(self.prompt_tokens + len(self._drawn))
                            self._drawn.append(token.token)
                            yield token
                            if token.end or len(self._drawn) == self.request.max_tokens:
                                return
                    except AttemptLostError:
                        lost |= await running.lost_nodes()
                        raise
            except AttemptLostError as err:
                if err.node is not None:
                    lost.add(err.node)
                _log.warning("session %s, attempt %d: %s", self.session, attempt, err.cause.message)
                if self.attempts == MAX_ATTEMPTS:
                    raise StageLostError(
                        f"the generation broke {MAX_ATTEMPTS} times, the last time after {len(self._drawn)} tokens: "
                        f"{err.cause.message}",
                        {"attempts": self.attempts, "tokens": len(self._drawn), "cause": err.cause.to_wire()},
                    ) from err.cause

    async def _begin(self, running: Attempt) -> None:
        request = self.request
        if self._prompt is None:
            prompt = await running.tokenize()
            if not prompt or len(prompt) % 4:
                raise InvalidParamsError("the prompt gives no tokens; give one with some text")
            self._prompt, self.prompt_tokens = prompt, len(prompt) // 4
        total = self.prompt_tokens + request.max_tokens
        if total > request.context_length:
            raise ContextOverflowError(
                f"the prompt takes {self.prompt_tokens} tokens and the answer up to {request.max_tokens}, a session "
                f"here has {request.context_length} (the model's context, or less by --ctx-size); shorten the prompt "
                "or lower max_tokens",
                {"prompt_tokens": self.prompt_tokens, "context_length": request.context_length},
            )
        await running.start(total, self._prompt, self._drawn)
