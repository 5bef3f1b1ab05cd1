"""What the daemon and an engine process say to each other, and the pipe that carries it.

A frame is its length in four bytes, big-endian, and one MessagePack value. The daemon sends `Request`, the process
answers each with `Answer` or `Refused` under its number, in any order, and sends `Ready`, `Drawn` and `Broken` of
itself. Activations never come this way.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from protocol.commands.sessions import (
    CloseSessionParams,
    OpenSessionParams,
    SessionFailed,
    SessionToken,
    StartSessionParams,
    TokenizeParams,
)

MAX_FRAME_BYTES = 32 << 20
"""A prompt as an RPC message may bring it, with room."""
MAX_UNSENT_BYTES = 64 << 20
"""Above it the other side is taken to be stuck, and the pipe is given up."""


class Load(msgspec.Struct, frozen=True, tag=True):
    """Load a shard file; answered by `Loaded`."""

    shard_id: int
    path: str


class Unload(msgspec.Struct, frozen=True, tag=True):
    """Free a shard's memory; refused while a session uses it."""

    shard_id: int


class Tokenize(msgspec.Struct, frozen=True, tag=True):
    """Answered by `Tokens`."""

    params: TokenizeParams


class Open(msgspec.Struct, frozen=True, tag=True):
    """Make a session ready on this stage."""

    params: OpenSessionParams


class Start(msgspec.Struct, frozen=True, tag=True):
    """Let it run."""

    params: StartSessionParams


class Close(msgspec.Struct, frozen=True, tag=True):
    """End it; nothing happens where it is not known (any more)."""

    params: CloseSessionParams


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Answered by `Condition`."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the process."""


Order = Load | Unload | Tokenize | Open | Start | Close | Inspect | Stop


class Request(msgspec.Struct, frozen=True, tag=True):
    """What the daemon sends."""

    number: int
    order: Order


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """A shard as the engine found it."""

    n_layers: int
    n_embd: int
    n_vocab: int
    is_first: bool
    is_last: bool
    memory_bytes: int


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """A prompt's token ids, int32, little-endian."""

    tokens: bytes


class Condition(msgspec.Struct, frozen=True, tag=True):
    """How the process is."""

    sessions: int
    shards: list[int]
    forwards: int
    forward_s: float
    transport: dict[str, int]
    """As in protocol.commands.nodes.TransportStatus."""


class Answer(msgspec.Struct, frozen=True, tag=True):
    """The request was carried out."""

    number: int
    result: Loaded | Tokens | Condition | None = None


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The request was not carried out."""

    number: int
    error: dict[str, Any]
    """As an error is on the wire."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The first message of a process."""

    ticket: str
    """Of its transport."""


class Drawn(msgspec.Struct, frozen=True, tag=True):
    """A session of which this is the last stage drew a token."""

    stage: int
    token: SessionToken


class Broken(msgspec.Struct, frozen=True, tag=True):
    """A session cannot go on; it is closed already."""

    failed: SessionFailed


FromProcess = Answer | Refused | Ready | Drawn | Broken

M = TypeVar("M")


class Pipe(asyncio.Protocol, Generic[M]):
    """One end of a socketpair. Callbacks run on the loop, in order, `on_closed` once and last."""

    def __init__(self, kind: Any, on_message: Callable[[M], None], on_closed: Callable[[str], None]) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._encoder = msgspec.msgpack.Encoder()
        self._on_message, self._on_closed = on_message, on_closed
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self._reason = "the other side closed the pipe"

    @classmethod
    async def over(
        cls, sock: socket.socket, kind: Any, on_message: Callable[[M], None], on_closed: Callable[[str], None]
    ) -> Pipe[M]:
        """Take over a connected stream socket; messages that come must be of `kind`."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, pipe = await loop.create_connection(lambda: cls(kind, on_message, on_closed), sock=sock)
        return pipe

    def send(self, message: msgspec.Struct) -> None:
        """Send at once as far as the socket takes it; never waits. A closed pipe swallows it."""
        if self._transport is None or self._transport.is_closing():
            return
        body = self._encoder.encode(message)
        if len(body) > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {len(body)} bytes is above the pipe's {MAX_FRAME_BYTES}")
        self._transport.write(len(body).to_bytes(4, "big") + body)
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._give_up(f"the other side does not read: {MAX_UNSENT_BYTES} bytes wait for it")

    def close(self) -> None:
        """Close after what is still unsent; `on_closed` follows."""
        if self._transport:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Of asyncio."""
        received = self._received
        received += data
        start = 0
        while len(received) - start >= 4:
            end = start + 4 + int.from_bytes(received[start : start + 4], "big")
            if end - start - 4 > MAX_FRAME_BYTES:
                return self._give_up(f"a frame announces {end - start - 4} bytes, above {MAX_FRAME_BYTES}")
            if len(received) < end:
                break
            try:
                message = self._decoder.decode(memoryview(received)[start + 4 : end])
            except msgspec.DecodeError as err:
                return self._give_up(f"a frame is not what was expected: {err}")
            start = end
            self._on_message(message)
        del received[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        """Of asyncio."""
        self._on_closed(f"the pipe broke: {exc}" if exc else self._reason)

    def _give_up(self, reason: str) -> None:
        self._reason = reason
        if self._transport:
            self._transport.abort()
