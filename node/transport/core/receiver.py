"""The inbox's half of a channel, without I/O: order, whole tensors, credits and acknowledgements.

What an inbox holds is bounded: frames that wait to be taken and chunks that came early by the window, the tensor
that is being put together by `max_frame_bytes`. Chunks of the tensor that the application takes next give their
credit back at once (or a tensor larger than the window could never arrive), those behind it when it is taken.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from node.transport.core.sender import Bytes
from node.transport.core.wire import ANSWER, END, Chunk, Reason
from node.transport.settings import MAX_CHUNK_BYTES, TransportSettings
from protocol.errors import PeerLostError, ShoalError

# Both are of 4 bytes; what is added here must be, too.
DTYPES = {"float32": np.dtype("<f4"), "int32": np.dtype("<i4")}
MAX_DIMENSIONS = 4


class MalformedFrameError(ValueError):
    """Raised when a sender that holds the key breaks the rules: beyond its credit, or chunks that do not fit."""


class Frame(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A tensor as it arrived. The array is the receiver's own."""

    sequence: int
    """The number that the sender gave it."""

    tensor: npt.NDArray[Any]
    """float32 or int32, at most four dimensions."""


@dataclass(slots=True)
class _Assembly:
    sequence: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    size: int
    data: Bytes
    filled: int = 0
    held_messages: int = 0
    held_bytes: int = 0

    def frame(self) -> Frame:
        return Frame(self.sequence, self.data.view(self.dtype).reshape(self.shape))


class _ReceivedChunk(msgspec.Struct, frozen=True, gc=False):
    data: Chunk
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    size: int
    payload: Bytes


class Receiver:
    """State of one inbox. The first sender with the key is bound to it for good."""

    def __init__(self, settings: TransportSettings) -> None:
        self._settings = settings
        self._ready: deque[_Assembly] = deque()
        self._assembly: _Assembly | None = None
        self._early: dict[int, _ReceivedChunk] = {}
        self._bytes = 0
        self._released_messages = 0
        self._released_bytes = 0
        self._told = (0, settings.window_messages, settings.window_bytes)
        self.received = 0
        """Messages that arrived without a gap."""
        self.ended: int | None = None
        """The reason that the sender gave for the end, once it came."""
        self.error: ShoalError | None = None
        self.bound = False
        self.heard_at = math.inf
        self.said_at = math.inf
        self.ack_at = math.inf
        """When an acknowledgement must leave, if nothing took it along before."""

    def bind(self, now: float) -> None:
        """A sender with the key came; answer it at once."""
        self.bound = True
        self.heard_at = self.said_at = self.ack_at = now

    def arrived(self, data: Chunk, shape: Sequence[int], dtype: str, read: Callable[[], Bytes], now: float) -> bool:
        """Take a chunk; `read` gives its bytes. False for one that arrived before.

        Raises MalformedFrameError when the sender breaks the rules; the channel must then end.
        """
        self.heard_at = now
        if data.flags & ANSWER:
            self.ack_at = now
        if data.number < self.received or data.number in self._early:
            self.ack_at = min(self.ack_at, now + self._settings.ack_delay_s)
            return False
        _, messages, size_bytes = self._told
        if data.number >= messages + (1 if data.flags & END else 0):
            raise MalformedFrameError(f"message {data.number} with credit for {messages}")
        chunk = _checked(data, shape, dtype, read, self._settings.max_frame_bytes)
        self._bytes += len(chunk.payload)
        if self._bytes > size_bytes:
            raise MalformedFrameError(f"{self._bytes} bytes with credit for {size_bytes}")
        self._early[data.number] = chunk
        while (chunk_in_turn := self._early.pop(self.received, None)) is not None:
            self.received += 1
            self._append(chunk_in_turn)
        self._plan_ack(now)
        return True

    def take(self, now: float) -> Frame | None:
        """The next whole frame. Gives its credit back."""
        if not self._ready:
            return None
        assembly = self._ready.popleft()
        self._release(assembly)
        if not self._ready and self._assembly is not None:
            self._release(self._assembly)
        self._plan_ack(now)
        return assembly.frame()

    @property
    def waiting(self) -> int:
        """Whole frames that wait to be taken."""
        return len(self._ready)

    def answer(self, now: float) -> tuple[int, int, int]:
        """What to acknowledge: messages that arrived, and the credit in messages and bytes from the start."""
        self.said_at = now
        self.ack_at = math.inf
        settings = self._settings
        self._told = (
            self.received,
            self._released_messages + settings.window_messages,
            self._released_bytes + settings.window_bytes,
        )
        return self._told

    def due(self) -> float:
        """When `tick` has something to do."""
        if not self.bound or self.error is not None:
            return math.inf
        if self.ended is not None:
            return self.ack_at
        lost_at = self.heard_at + self._settings.lost_after_s
        return min(self.ack_at, lost_at, self.said_at + self._settings.heartbeat_s)

    def tick(self, now: float) -> bool:
        """Whether an answer is due. Sets `error` when the sender is lost."""
        if not self.bound or self.error is not None:
            return False
        if self.ended is not None:
            return now >= self.ack_at
        if now >= self.heard_at + self._settings.lost_after_s:
            self.error = PeerLostError(f"the sender said nothing for {now - self.heard_at:.1f} s; plan again")
            return False
        return now >= min(self.ack_at, self.said_at + self._settings.heartbeat_s)

    def ignore_pause(self, pause_s: float) -> None:
        """This process was paused for `pause_s`: the peer's silence in that time is not counted."""
        self.heard_at += pause_s

    def _append(self, chunk: _ReceivedChunk) -> None:
        data = chunk.data
        if data.flags & END:
            if self._assembly is not None and data.sequence != Reason.CUT:
                raise MalformedFrameError("the end in the middle of a tensor")
            self._assembly = None
            self.ended = data.sequence
            return
        assembly = self._assembly
        if assembly is None:
            whole = len(chunk.payload) == chunk.size
            buffer = chunk.payload if whole else np.empty(chunk.size, np.uint8)
            assembly = self._assembly = _Assembly(data.sequence, chunk.shape, chunk.dtype, chunk.size, buffer)
        else:
            whole = False
        same = (assembly.sequence, assembly.shape, assembly.dtype) == (data.sequence, chunk.shape, chunk.dtype)
        end = data.offset + len(chunk.payload)
        if not same or data.offset != assembly.filled or end > assembly.size or (end == data.offset and not whole):
            raise MalformedFrameError(f"a chunk at {data.offset} that does not continue its tensor")
        if not whole:
            assembly.data[data.offset : end] = chunk.payload
        assembly.filled = end
        assembly.held_messages += 1
        assembly.held_bytes += len(chunk.payload)
        if end == assembly.size:
            self._ready.append(assembly)
            self._assembly = None
        elif not self._ready:
            self._release(assembly)

    def _release(self, assembly: _Assembly) -> None:
        self._released_messages += assembly.held_messages
        self._released_bytes += assembly.held_bytes
        assembly.held_messages = assembly.held_bytes = 0

    def _plan_ack(self, now: float) -> None:
        settings = self._settings
        received, messages, size_bytes = self._told
        urgent = (
            self.ended is not None
            or self.received - received >= settings.window_messages // 2
            or self._released_messages + settings.window_messages - messages >= settings.window_messages // 2
            or self._released_bytes + settings.window_bytes - size_bytes >= settings.window_bytes // 2
        )
        self.ack_at = min(self.ack_at, now if urgent else now + settings.ack_delay_s)


def _checked(
    data: Chunk, shape: Sequence[int], dtype: str, read: Callable[[], Bytes], max_bytes: int
) -> _ReceivedChunk:
    if data.flags & END:
        return _ReceivedChunk(data, (), DTYPES["int32"], 0, np.empty(0, np.uint8))
    known = DTYPES.get(dtype)
    if known is None or len(shape) > MAX_DIMENSIONS or (shape and min(shape) < 0):
        raise MalformedFrameError(f"a tensor of dtype {dtype[:20]!r} and {len(shape)} dimensions")
    size = 4 * math.prod(shape)
    # A length of 0 must not hide others that no array can have.
    if 4 * math.prod(length or 1 for length in shape) > max_bytes:
        raise MalformedFrameError(f"a tensor of {size} bytes, at most {max_bytes} are taken")
    payload = read()
    if len(payload) > min(MAX_CHUNK_BYTES, size):
        raise MalformedFrameError(f"a chunk of {len(payload)} bytes in a tensor of {size}")
    return _ReceivedChunk(data, tuple(shape), known, size, payload)
