"""What the sessions of a stage ask of the engine and of the transport.

`node.pipeline.worker.main` passes llama.cpp and tensor_iroh; tests of the scheduling pass an engine without a model and
a transport in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from node.pipeline.engine.batch import Slot
from node.pipeline.engine.loaded_shard import LoadedShard
from protocol.commands.tasks import Sampling

Activation = NDArray[np.float32] | NDArray[np.int32]
"""float32 [n, n_embd] hidden states; from the last stage to the first, int32 [1]: the sampled token."""


class Tokenizer(Protocol):
    """The vocabulary of a model: text to token ids and back."""

    chat_template: str | None
    bos_text: str
    eos_text: str

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Sequence[int]: ...
    def piece(self, token: int) -> bytes: ...
    def is_end(self, token: int) -> bool: ...


class ForwardEngine(Protocol):
    """Runs layers. Synchronous; one call at a time."""

    def load(self, shard_id: int, path: Path) -> LoadedShard: ...
    def unload(self, shard_id: int) -> None: ...
    def open_sequence(self) -> int: ...
    def close_sequence(self, sequence: int) -> None: ...
    def forward(self, shard_ids: Sequence[int], slots: Sequence[Slot]) -> Sequence[NDArray[np.float32]]: ...
    def sample(self, logits: NDArray[np.float32], sampling: Sampling, position: int) -> int: ...
    def vocabulary(self, shard_id: int) -> Tokenizer: ...


class ActivationFrame(Protocol):
    """One activation as it arrived, with its number in the channel."""

    @property
    def sequence(self) -> int: ...
    @property
    def tensor(self) -> Activation: ...


class FrameReceiver(Protocol):
    """The receiving end of a channel; frames come in order."""

    async def receive(self, timeout_s: float | None = None) -> ActivationFrame: ...
    def close(self) -> None: ...


class FrameSender(Protocol):
    """The sending end of a channel."""

    async def send(self, sequence: int, tensor: Activation) -> None: ...
    def close(self) -> None: ...


class FrameTransport(Protocol):
    """A process's end of the transport."""

    @property
    def ticket(self) -> str: ...
    def open_inbox(self, channel: str, key: bytes) -> FrameReceiver: ...
    def open_outlet(self, ticket: str, channel: str, key: bytes) -> FrameSender: ...
    def on_peer_lost(self, callback: Callable[[str], None]) -> Callable[[], None]: ...
