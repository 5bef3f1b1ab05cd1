"""What the session side of a stage asks of its engine and its transport, and nothing more.

`node.pipeline.worker.main` passes the real ones in; a test of the scheduling passes small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from protocol.commands.tasks import Sampling

Array = NDArray[np.float32] | NDArray[np.int32]


class ShardFacts(Protocol):
    """What loading a shard found."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def n_vocab(self) -> int: ...
    @property
    def is_first(self) -> bool: ...
    @property
    def is_last(self) -> bool: ...
    @property
    def memory_bytes(self) -> int: ...


class Words(Protocol):
    """The vocabulary of a model."""

    chat_template: str | None
    bos_text: str
    eos_text: str

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Sequence[int]: ...
    def piece(self, token: int) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


class SlotValues(Protocol):
    """One sequence's part of a batch."""

    @property
    def sequence(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def values(self) -> Array: ...
    @property
    def logits_for_last(self) -> bool: ...


class EngineLike(Protocol):
    """Synchronous; every call is made from one thread."""

    def load(self, shard_id: int, path: Path) -> ShardFacts: ...
    def unload(self, shard_id: int) -> None: ...
    def open_sequence(self) -> int: ...
    def close_sequence(self, sequence: int) -> None: ...
    def forward(self, shard_ids: Sequence[int], slots: Sequence[SlotValues]) -> Sequence[NDArray[np.float32]]: ...
    def sample(self, logits: NDArray[np.float32], sampling: Sampling, position: int) -> int: ...
    def vocabulary(self, shard_id: int) -> Words: ...


class FrameLike(Protocol):
    """One tensor as it arrived."""

    @property
    def sequence(self) -> int: ...
    @property
    def tensor(self) -> Array: ...


class InboxLike(Protocol):
    """Frames of one channel, in order."""

    async def receive(self, timeout_s: float | None = None) -> FrameLike: ...
    def close(self) -> None: ...


class OutletLike(Protocol):
    """Where frames of one channel are sent, in order."""

    async def send(self, sequence: int, tensor: Array) -> None: ...
    def close(self) -> None: ...


class EndpointLike(Protocol):
    """A process's end of the transport."""

    @property
    def ticket(self) -> str: ...
    def open_inbox(self, channel: str, key: bytes) -> InboxLike: ...
    def open_outlet(self, ticket: str, channel: str, key: bytes) -> OutletLike: ...
    def on_peer_lost(self, callback: Callable[[str], None]) -> Callable[[], None]: ...
