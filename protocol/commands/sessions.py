"""TOKENIZE, OPEN_SESSION, START_SESSION, CLOSE_SESSION: what a coordinating node asks of the nodes that run stages."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from protocol.commands.common import ChatMessage, Params, Result, Text
from protocol.commands.tasks import Sampling
from protocol.ids import ManifestDigest, ShardId


class TokenizeParams(Params, frozen=True, kw_only=True):
    """TOKENIZE: a prompt or chat to token ids, by the stage that has the model's first shard."""

    model: ManifestDigest
    prompt: Text | None = None
    messages: tuple[ChatMessage, ...] | None = None


class TokenizeResult(Result, frozen=True, kw_only=True):
    """Answer of TOKENIZE."""

    tokens: bytes
    """int32, little-endian."""


class OpenSessionParams(Params, frozen=True, kw_only=True):
    """OPEN_SESSION: make ready a run of shards for one session; frames may then arrive.

    A session whose connection closes is closed with it. The last stage sends a SESSION_TOKEN notification for
    every token that it draws, on the connection that opened it.
    """

    session: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    key: Annotated[bytes, msgspec.Meta(min_length=16, max_length=32)]
    """Secret of the session: an activation without it is dropped."""
    attempt: Annotated[int, msgspec.Meta(ge=0, le=1_000)] = 0
    model: ManifestDigest
    stage: Annotated[int, msgspec.Meta(ge=0, le=10_000)]
    """Place in the pipeline."""
    n_stages: Annotated[int, msgspec.Meta(ge=1, le=10_000)]
    shards: Annotated[tuple[ShardId, ...], msgspec.Meta(min_length=1)]
    exact: bool = False
    n_positions: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    """Tokens of prompt and answer together; more than the stage's context is refused."""
    sampling: Sampling = Sampling()
    """For the last stage."""


class OpenSessionResult(Result, frozen=True, kw_only=True):
    """Answer of OPEN_SESSION."""

    ticket: str
    """Where the stage before sends its activations."""


class StartSessionParams(Params, frozen=True, kw_only=True):
    """START_SESSION: give every stage the address of the next one, the last stage first, then start stage 0."""

    session: str
    attempt: Annotated[int, msgspec.Meta(ge=0)] = 0
    stage: Annotated[int, msgspec.Meta(ge=0)]
    next_ticket: str
    """Of the following stage; the last stage has that of stage 0, to send it the tokens."""
    tokens: bytes = b""
    """For stage 0: the prompt, int32, little-endian."""
    replay: bytes = b""
    """For stage 0: tokens drawn by an attempt that died, to be run through again, not drawn again."""
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1


class CloseSessionParams(Params, frozen=True, kw_only=True):
    """CLOSE_SESSION."""

    session: str
    attempt: Annotated[int, msgspec.Meta(ge=0)] = 0
    stage: Annotated[int, msgspec.Meta(ge=0)]


class SessionToken(Result, frozen=True, kw_only=True):
    """SESSION_TOKEN notification, from the node of the last stage."""

    session: str
    attempt: int
    position: int
    """Of the token in the sequence, the prompt's first token being 0."""
    token: int
    piece: bytes
    """Its bytes as text; a character may span several tokens."""
    end: bool
    """An end-of-generation token: not part of the answer."""


class SessionFailed(Result, frozen=True, kw_only=True):
    """SESSION_FAILED notification: a stage cannot go on."""

    session: str
    attempt: int
    stage: int
    error: dict[str, Any]
    """As an error is on the wire."""
