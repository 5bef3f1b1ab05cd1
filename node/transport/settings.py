"""The settings of the transport, checked at construction."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CHUNK_BYTES = 4 << 20
"""The largest payload of one message that a receiver takes, whatever the sender's settings are."""

FIRST_MESSAGES = 4
FIRST_BYTES = 1 << 20
"""What a sender may have in flight before the receiver has answered once: part of the protocol, the same
everywhere, because the receiver's own settings are not known yet. A first chunk must fit in it."""


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """Times, credits and bounds of one endpoint. Invariants are checked at construction (ValueError)."""

    heartbeat_s: float = 0.5
    """A side that said nothing on a channel for this long says that it is there."""

    lost_after_s: float = 2.4
    """A peer that was silent for this long is lost. With the heartbeat's grain it keeps the promise of 3 s."""

    ack_delay_s: float = 0.04
    """How long an acknowledgement may wait for a frame to the same peer that takes it along."""

    resend_after_s: float = 1.0
    """Without progress for this long, the oldest unacknowledged message goes out again. tensor_iroh's streams
    are reliable, so this is for the connection that broke and was made again."""

    open_timeout_s: float = 10.0
    """How long a sender waits for the first answer of the inbox before the channel fails."""

    first_answer_s: float = 0.03
    """The first message goes out again after this long, then after twice, four times... while no inbox answers."""

    window_messages: int = 64
    """Messages in flight or waiting in an inbox: the credit in messages of one channel."""

    window_bytes: int = 8 << 20
    """Payload bytes in flight or waiting in an inbox: the credit in bytes of one channel. Measured on two cores:
    four to eight chunks of 512 KiB in flight give the most that tensor_iroh has."""

    chunk_bytes: int = 512 << 10
    """Larger tensors go in chunks of this size. Measured: 512 KiB chunks, eight in flight, 290 MB/s; whole
    tensors of 16 MiB 170 MB/s."""

    max_frame_bytes: int = 1 << 30
    """The largest tensor that is sent or put together."""

    max_channels: int = 1024
    """Inboxes, and outlets, that may be open at once."""

    max_serving: int = 8
    """Pull requests that are answered at once; requesters beyond it ask again."""

    pull_again_s: float = 0.5
    """A pull request that is not answered goes out again after this long."""

    max_registered: int = 256
    """Tensors that may be registered for pulling."""

    close_timeout_s: float = 1.0
    """How long closing waits for what is in flight to be acknowledged."""

    def __post_init__(self) -> None:
        if not 0 < self.ack_delay_s < self.heartbeat_s < self.lost_after_s / 2:
            raise ValueError(
                f"ack_delay_s ({self.ack_delay_s:g}) < heartbeat_s ({self.heartbeat_s:g}) < lost_after_s / 2 "
                f"({self.lost_after_s / 2:g}) must hold, or living peers count as lost"
            )
        if not 4 <= self.chunk_bytes <= min(self.window_bytes // 2, FIRST_BYTES, MAX_CHUNK_BYTES):
            raise ValueError(
                f"chunk_bytes is {self.chunk_bytes}: it must be 4 to {FIRST_BYTES}, and at most half of window_bytes"
            )
        if self.chunk_bytes % 4:
            raise ValueError(f"chunk_bytes is {self.chunk_bytes}: it must be a multiple of 4, the size of an element")
        if self.window_bytes < FIRST_BYTES or self.window_messages < FIRST_MESSAGES:
            raise ValueError(
                f"the window is {self.window_messages} messages and {self.window_bytes} bytes: it must be at least "
                f"{FIRST_MESSAGES} messages and {FIRST_BYTES} bytes"
            )
        for name in ("max_channels", "max_serving", "max_frame_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("open_timeout_s", "first_answer_s", "resend_after_s", "pull_again_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: it must be above 0")
        for name in ("max_registered", "close_timeout_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: it must be at least 0")
