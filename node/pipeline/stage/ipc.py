"""The messages between the daemon and an engine process, and the pipe that carries them.

A frame is its length in four bytes, big-endian, and one MessagePack value. The daemon sends a `NumberedRequest`, the
process answers each with a `SuccessReply` or an `ErrorReply` of the same number, in any order, and sends `EngineReady`,
`TokenEvent` and `FailureEvent` without being asked. Activations never go through this pipe.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from node.pipeline.engine.loaded_shard import LoadedShard
from protocol.commands.sessions import (
    CloseSessionParams,
    OpenSessionParams,
    SessionFailed,
    SessionToken,
    StartSessionParams,
    TokenizeParams,
)
from protocol.structs import prepared


@dataclass(frozen=True)
class PipeLimits:
    """What one end of a pipe takes and keeps."""

    frame_bytes: int = 32 << 20
    """A prompt of the largest RPC message fits."""
    unsent_bytes: int = 64 << 20
    """If more waits to be sent, the other side is stuck, and the pipe is closed."""


class SessionId(NamedTuple):
    """Names a session on one stage."""

    session: str
    attempt: int
    stage: int

    @classmethod
    def of(cls, params: OpenSessionParams | StartSessionParams | CloseSessionParams | SessionFailed) -> SessionId:
        """The session that a message is about."""
        return cls(params.session, params.attempt, params.stage)


class LoadRequest(msgspec.Struct, frozen=True, tag=True):
    """Load a shard file; answered with a `LoadedShard`."""

    shard_id: int
    path: str


class UnloadRequest(msgspec.Struct, frozen=True, tag=True):
    """Free a shard's memory; an error while a session uses it."""

    shard_id: int


class TokenizeRequest(msgspec.Struct, frozen=True, tag=True):
    """Answered with `PromptTokens`."""

    params: TokenizeParams


class OpenRequest(msgspec.Struct, frozen=True, tag=True):
    """Open a session on this stage."""

    params: OpenSessionParams


class StartRequest(msgspec.Struct, frozen=True, tag=True):
    """Run an open session."""

    params: StartSessionParams


class CloseRequest(msgspec.Struct, frozen=True, tag=True):
    """Close a session; does nothing if it is not open."""

    params: CloseSessionParams


class StatusRequest(msgspec.Struct, frozen=True, tag=True):
    """Answered with an `EngineStatus`."""


class StopRequest(msgspec.Struct, frozen=True, tag=True):
    """End the process."""


EngineRequest = (
    LoadRequest
    | UnloadRequest
    | TokenizeRequest
    | OpenRequest
    | StartRequest
    | CloseRequest
    | StatusRequest
    | StopRequest
)


class NumberedRequest(msgspec.Struct, frozen=True, tag=True):
    """What the daemon sends."""

    number: int
    request: EngineRequest


class PromptTokens(msgspec.Struct, frozen=True, tag=True):
    """A prompt's token ids, int32, little-endian."""

    tokens: bytes


class EngineStatus(msgspec.Struct, frozen=True, tag=True):
    """What an engine process runs, and its figures since it started."""

    sessions: int
    """Open ones."""
    shards: list[int]
    """Loaded ones."""
    forwards: int
    forward_s: float
    transport: dict[str, int]
    """As in protocol.commands.nodes.TransportStatus."""


EngineResult = LoadedShard | PromptTokens | EngineStatus | None


class SuccessReply(msgspec.Struct, frozen=True, tag=True):
    """The request succeeded."""

    number: int
    result: EngineResult = None


class ErrorReply(msgspec.Struct, frozen=True, tag=True):
    """The request failed."""

    number: int
    error: dict[str, Any]
    """As an error is on the wire."""


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """The first message of a process."""

    ticket: str
    """Of its transport."""


class TokenEvent(msgspec.Struct, frozen=True, tag=True):
    """A session whose last stage this is sampled a token."""

    stage: int
    token: SessionToken


class FailureEvent(msgspec.Struct, frozen=True, tag=True):
    """A session failed, and is closed."""

    failed: SessionFailed


EngineMessage = SuccessReply | ErrorReply | EngineReady | TokenEvent | FailureEvent

M = TypeVar("M")


class Pipe(asyncio.Protocol, Generic[M]):
    """One end of a socketpair. Callbacks run on the loop, in order, `on_closed` once and last."""

    def __init__(
        self,
        kind: Any,
        on_message: Callable[[M], None],
        on_closed: Callable[[str], None],
        limits: PipeLimits,
    ) -> None:
        self._decoder = msgspec.msgpack.Decoder(prepared(kind))
        self._encoder = msgspec.msgpack.Encoder()
        self._on_message, self._on_closed, self._limits = on_message, on_closed, limits
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._reason = "the other side closed the pipe"

    @classmethod
    async def over(
        cls,
        sock: socket.socket,
        kind: Any,
        on_message: Callable[[M], None],
        on_closed: Callable[[str], None],
        *,
        limits: PipeLimits = PipeLimits(),
    ) -> Pipe[M]:
        """Take over a connected stream socket; every message that arrives must be of `kind`."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, pipe = await loop.create_connection(lambda: cls(kind, on_message, on_closed, limits), sock=sock)
        return pipe

    def send(self, message: msgspec.Struct) -> None:
        """Send without waiting; what the socket does not take now is buffered. Does nothing if the pipe is closed."""
        if self._transport is None or self._transport.is_closing():
            return
        body = self._encoder.encode(message)
        if len(body) > self._limits.frame_bytes:
            raise ValueError(f"a frame has {len(body)} bytes, above the limit of {self._limits.frame_bytes}")
        self._transport.write(len(body).to_bytes(4, "big") + body)
        if self._transport.get_write_buffer_size() > self._limits.unsent_bytes:
            self._abort(f"the other side does not read: more than {self._limits.unsent_bytes} bytes wait to be sent")

    def close(self) -> None:
        """Close once everything is sent; `on_closed` follows."""
        if self._transport:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        received = self._received
        received += data
        start = 0
        while len(received) - start >= 4:
            size, limit = int.from_bytes(received[start : start + 4], "big"), self._limits.frame_bytes
            end = start + 4 + size
            if size > limit:
                return self._abort(f"a frame announces {size} bytes, above the limit of {limit}")
            if len(received) < end:
                break
            try:
                message = self._decoder.decode(memoryview(received)[start + 4 : end])
            except msgspec.DecodeError as err:
                return self._abort(f"a frame cannot be decoded: {err}")
            start = end
            self._on_message(message)
        del received[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._on_closed(f"the pipe broke: {exc}" if exc else self._reason)

    def _abort(self, reason: str) -> None:
        self._reason = reason
        if self._transport:
            self._transport.abort()
