"""The driver of one generation: opens a session on the nodes of a plan, and yields tokens as they are sampled.

If a stage is lost, the driver plans again and replays the tokens so far on the new stages: the stream goes on, and no
token is lost or doubled. The driver gets a connection for each node and attempt; a node closes the sessions of a lost
connection, so a driver that dies leaves no session open.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from node.pipeline.driver.attempt import (
    Attempt,
    AttemptLostError,
    Connect,
    DriverSettings,
    GeneratedToken,
    GenerationRequest,
)
from node.pipeline.driver.plan import Plan
from protocol.errors import ContextOverflowError, InvalidParamsError, StageLostError
from protocol.ids import NodeId

MakePlan = Callable[[frozenset[NodeId]], Awaitable[Plan]]
"""Makes a plan without the lost nodes, and returns once every shard of the plan is loaded."""
_log = logging.getLogger(__name__)


@dataclass
class Generation:
    """One answer of a model. Iterate `tokens()` once; the fields say what happened."""

    request: GenerationRequest
    make_plan: MakePlan
    connect: Connect
    settings: DriverSettings = field(default_factory=DriverSettings)
    plan: Plan | None = None
    """Of the last attempt."""
    attempts: int = 0
    prompt_tokens: int = 0
    session: str = field(default_factory=lambda: secrets.token_hex(8))
    _prompt: bytes | None = None
    _sampled: list[int] = field(default_factory=list)

    async def tokens(self) -> AsyncGenerator[GeneratedToken, None]:
        """Yield the tokens of the answer, at most `max_tokens`.

        Use `contextlib.aclosing` if the loop may end early. Raises ContextOverflowError before any stage computes,
        StageLostError after `settings.max_attempts` attempts, and what planning, tokenizing and opening raise.
        """
        lost: set[NodeId] = set()
        while True:
            attempt = self.attempts
            self.attempts += 1
            self.plan = None
            try:
                self.plan = await self.make_plan(frozenset(lost))
                async with Attempt.open(
                    self.session, attempt, self.request, self.plan, self.connect, self.settings
                ) as running:
                    try:
                        await self._begin(running)
                        while True:
                            token = await running.next_token(self.prompt_tokens + len(self._sampled))
                            self._sampled.append(token.token)
                            yield token
                            if token.end or len(self._sampled) == self.request.max_tokens:
                                return
                    except AttemptLostError:
                        lost |= await running.lost_nodes()
                        raise
            except AttemptLostError as err:
                if err.node is not None:
                    lost.add(err.node)
                _log.warning("session %s, attempt %d: %s", self.session, attempt, err.cause.message)
                if self.attempts == self.settings.max_attempts:
                    raise StageLostError(
                        f"the generation broke {self.attempts} times, the last time after {len(self._sampled)} tokens: "
                        f"{err.cause.message}",
                        {"attempts": self.attempts, "tokens": len(self._sampled), "cause": err.cause.to_wire()},
                    ) from err.cause

    async def _begin(self, running: Attempt) -> None:
        request = self.request
        if self._prompt is None:
            prompt = await running.tokenize()
            if not prompt or len(prompt) % 4:
                raise InvalidParamsError("the prompt has no tokens; give a prompt with text")
            self._prompt, self.prompt_tokens = prompt, len(prompt) // 4
        total = self.prompt_tokens + request.max_tokens
        if total > request.context_length:
            raise ContextOverflowError(
                f"the prompt takes {self.prompt_tokens} tokens and the answer up to {request.max_tokens}, a session "
                f"here has {request.context_length} (the model's context, or less by --ctx-size); shorten the prompt "
                "or lower max_tokens",
                {"prompt_tokens": self.prompt_tokens, "context_length": request.context_length},
            )
        await running.start(total, self._prompt, self._sampled)
