"""The outlet's half of a channel, without I/O: what may be sent, what must be resent, when the peer is lost.

Credits: the receiver says up to which message and which byte, counted from the channel's start, the sender may
go. What left is kept, sealed, until it is acknowledged; that is at most the window. Acknowledgements are cumulative.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from node.transport.core.wire import ANSWER, END, Reason
from node.transport.settings import FIRST_BYTES, FIRST_MESSAGES, TransportSettings
from protocol.errors import PeerLostError, ShoalError, TransportError

Bytes = npt.NDArray[np.uint8]
Seal = Callable[[Bytes, list[int], str], object]
"""Copies a chunk (flat bytes, shape and dtype of the whole tensor) into what the network takes."""

_RESEND_AT_ONCE = 8


class Message(msgspec.Struct, gc=False):
    """A chunk that left and is not acknowledged yet."""

    number: int
    sequence: int
    offset: int
    flags: int
    body: object
    size_bytes: int


@dataclass(slots=True)
class _Frame:
    sequence: int
    shape: list[int]
    dtype: str
    data: Bytes
    offset: int = 0
    started: bool = False


class Sender:
    """State of one outlet. One frame is accepted at a time; `blocked` says that it still waits for credit."""

    def __init__(self, settings: TransportSettings, seal: Seal, now: float) -> None:
        self._settings = settings
        self._seal = seal
        self._frame: _Frame | None = None
        self._kept: deque[Message] = deque()
        self._next = 0
        self._bytes = 0
        self._limit_messages = FIRST_MESSAGES
        self._limit_bytes = FIRST_BYTES
        self._probes = 0
        self._resend_at = now + settings.first_answer_s
        self._backoff_s = settings.first_answer_s
        self._opened_at = now
        self.accepted = False
        """Whether the inbox has answered."""
        self.ending = False
        self.error: ShoalError | None = None
        """Why nothing can be sent any more."""
        self.heard_at = now
        self.said_at = now

    @property
    def blocked(self) -> bool:
        """A frame was offered and not all of it could leave."""
        return self._frame is not None

    @property
    def idle(self) -> bool:
        """All that was offered left and was acknowledged."""
        return self._frame is None and not self._kept

    @property
    def done(self) -> bool:
        """Nothing more will happen: it failed, or its end was acknowledged."""
        return self.error is not None or (self.ending and not self._kept)

    @property
    def in_flight(self) -> tuple[int, int]:
        """Messages and payload bytes that are not acknowledged."""
        return len(self._kept), sum(message.size_bytes for message in self._kept)

    def offer(self, sequence: int, shape: list[int], dtype: str, data: Bytes) -> None:
        """Take a frame. `data` must not change until `blocked` is false. Call `fill` next."""
        if self._frame is not None:
            raise AssertionError("a frame was offered while another one waits")
        self._frame = _Frame(sequence, shape, dtype, data)

    def withdraw(self) -> bool:
        """Take back the offered frame. False if part of it was sent: then the channel must end."""
        frame, self._frame = self._frame, None
        return frame is None or not frame.started

    def end(self, reason: Reason) -> None:
        """After what was sent, the end. It takes no credit."""
        if not self.ending and self.error is None:
            self._frame = None
            self.ending = True
            self._keep(Message(self._next, int(reason), 0, END | ANSWER, None, 0))

    def fill(self, now: float) -> list[Message]:
        """The messages that may be sent now, in order."""
        messages: list[Message] = []
        while (frame := self._frame) is not None and self._next < self._limit_messages:
            size = min(len(frame.data) - frame.offset, self._settings.chunk_bytes)
            if self._bytes + size > self._limit_bytes:
                break
            chunk = frame.data[frame.offset : frame.offset + size]
            body = self._seal(chunk, frame.shape, frame.dtype)
            message = Message(self._next, frame.sequence, frame.offset, 0, body, size)
            if not self._kept:
                self._schedule_resend(now)
            self._keep(message)
            messages.append(message)
            frame.started = True
            frame.offset += size
            if frame.offset == len(frame.data):
                self._frame = None
        return messages

    @property
    def end_message(self) -> Message | None:
        """The message that says the end, until it is acknowledged."""
        return self._kept[-1] if self.ending and self._kept else None

    def abandon(self) -> None:
        """The receiver takes no more: drop what was not acknowledged."""
        self._kept.clear()

    def acknowledged(self, received: int, messages: int, size_bytes: int, now: float) -> list[Message]:
        """The receiver's answer. Returns the messages to resend because the inbox was not open when they arrived."""
        if received > self._next:
            return []
        self.heard_at = now
        progress = False
        while self._kept and self._kept[0].number < received:
            self._kept.popleft()
            progress = True
        self._limit_messages = max(self._limit_messages, messages)
        self._limit_bytes = max(self._limit_bytes, size_bytes)
        first, self.accepted = not self.accepted, True
        if first or progress:
            self._schedule_resend(now)
        return list(self._kept) if first and self._probes else []

    def due(self) -> float:
        """When `tick` has something to do."""
        if self.done:
            return math.inf
        if not self.accepted:
            return min(self._resend_at, self._opened_at + self._settings.open_timeout_s)
        lost_at = self.heard_at + self._settings.lost_after_s
        again_at = self._resend_at if self._kept else math.inf
        return min(lost_at, again_at, self.said_at + self._settings.heartbeat_s)

    def tick(self, now: float) -> tuple[list[Message], bool]:
        """The messages to resend, and whether a heartbeat is due. Sets `error` if the peer is lost."""
        settings = self._settings
        if self.done:
            return [], False
        if not self.accepted and now >= self._opened_at + settings.open_timeout_s:
            self.error = TransportError(
                f"no inbox answered within {settings.open_timeout_s:g} s: the peer is gone, or never opened this "
                "channel with this key; open the inbox first, or plan again"
            )
            return [], False
        if self.accepted and now >= self.heard_at + settings.lost_after_s:
            self.error = PeerLostError(f"the receiver said nothing for {now - self.heard_at:.1f} s; plan again")
            return [], False
        again: list[Message] = []
        heartbeat_due = now >= self.said_at + settings.heartbeat_s and self.accepted
        if now >= self._resend_at and (self._kept or not self.accepted):
            heartbeat_due |= not self._kept
            again = [self._kept[i] for i in range(min(len(self._kept), _RESEND_AT_ONCE if self.accepted else 1))]
            self._probes += 1
            self._backoff_s = min(self._backoff_s * 2, max(settings.heartbeat_s, settings.resend_after_s))
            self._resend_at = now + self._backoff_s
        return again, heartbeat_due

    def ignore_pause(self, pause_s: float) -> None:
        """This process was paused for `pause_s`: the peer's silence in that time is not counted."""
        self.heard_at += pause_s
        self._opened_at += pause_s
        self._resend_at += pause_s

    def _keep(self, message: Message) -> None:
        self._kept.append(message)
        self._next += 1
        self._bytes += message.size_bytes

    def _schedule_resend(self, now: float) -> None:
        wait_s = self._settings.resend_after_s if self.accepted else self._settings.first_answer_s
        self._backoff_s = wait_s
        self._resend_at = now + wait_s
