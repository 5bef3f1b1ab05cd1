"""A small engine and an in-memory transport, for what the session side does with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from node.pipeline.engine.batch import Slot
from node.pipeline.engine.loaded_shard import LoadedShard
from node.pipeline.worker.channels import LocalFrame
from node.pipeline.worker.interfaces import Activation
from protocol.commands.tasks import Sampling
from protocol.errors import EngineError, PeerLostError, TransportError

N_EMBD = 3
N_VOCAB = 97
END_TOKEN = 96


class TinyTokenizer:
    chat_template: str | None = "{% for m in messages %}{{ m.content }}{% endfor %}"
    bos_text = "<s>"
    eos_text = "</s>"

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Sequence[int]:
        return [1] * add_special + [2 + ord(letter) % 90 for letter in text]

    def piece(self, token: int) -> bytes:
        return b"<%d>" % token

    def is_end(self, token: int) -> bool:
        return token == END_TOKEN


@dataclass
class TinyEngine:
    """Every output depends on everything that a sequence was given before, in order, in every shard."""

    n_shards: int
    seconds: float = 0.0
    """That a forward takes."""
    shapes: list[list[int]] = field(default_factory=list)
    """Of every forward: values of each slot."""
    sampled: list[tuple[int, Sampling]] = field(default_factory=list)
    open: set[int] = field(default_factory=set)
    broken: bool = False
    ends_at: int | None = None
    """Position at which the end token is drawn."""
    _caches: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def load(self, shard_id: int, path: Path) -> LoadedShard:
        return LoadedShard(
            start_layer=shard_id,
            end_layer=shard_id + 1,
            n_embd=N_EMBD,
            n_vocab=N_VOCAB,
            is_first=shard_id == 0,
            is_last=shard_id == self.n_shards - 1,
            memory_bytes=1,
        )

    def unload(self, shard_id: int) -> None: ...

    def open_sequence(self) -> int:
        sequence = next(n for n in range(1000) if n not in self.open)
        self.open.add(sequence)
        return sequence

    def close_sequence(self, sequence: int) -> None:
        self.open.discard(sequence)
        for key in [key for key in self._caches if key[1] == sequence]:
            del self._caches[key]

    def vocabulary(self, shard_id: int) -> TinyTokenizer:
        return TinyTokenizer()

    def forward(self, shard_ids: Sequence[int], slots: Sequence[Slot]) -> Sequence[NDArray[np.float32]]:
        if self.seconds:
            import time

            time.sleep(self.seconds)
        if self.broken:
            raise EngineError("broken on purpose")
        self.shapes.append([len(slot.values) for slot in slots])
        assert len({slot.sequence for slot in slots}) == len(slots)
        return [self._one(shard_ids, slot) for slot in slots]

    def _one(self, shard_ids: Sequence[int], slot: Slot) -> NDArray[np.float32]:
        assert slot.sequence in self.open
        states = slot.values.astype(np.float64)
        if shard_ids[0] == 0:
            states = np.repeat(states[:, None], N_EMBD, 1)
        for shard_id in shard_ids:
            cache = self._caches.setdefault((shard_id, slot.sequence), [])
            assert len(cache) == slot.position, "tokens are missing or came twice"
            for row in range(len(states)):
                cache.append(float(states[row, 0]))
                mixed = sum((index + 1) * value for index, value in enumerate(cache)) + shard_id + 1
                states[row] = mixed % 9973
        if shard_ids[-1] != self.n_shards - 1:
            return states.astype(np.float32)
        if not slot.logits_for_last:
            return np.empty(0, np.float32)
        logits = np.zeros(N_VOCAB, np.float32)
        logits[int(states[-1, 0]) % END_TOKEN] = 1
        return logits

    def sample(self, logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
        self.sampled.append((position, sampling))
        return END_TOKEN if position == self.ends_at else int(logits.argmax())


class MemoryNetwork:
    """Endpoints that reach each other within one loop."""

    def __init__(self) -> None:
        self.inboxes: dict[tuple[str, str], MemoryInbox] = {}
        self.endpoints: dict[str, MemoryEndpoint] = {}
        self.log: list[str] = []
        """What was sent, as `ticket channel`."""

    def endpoint(self, ticket: str) -> MemoryEndpoint:
        found = self.endpoints[ticket] = MemoryEndpoint(self, ticket)
        return found

    def kill(self, ticket: str) -> None:
        """A process is gone; its peers notice."""
        del self.endpoints[ticket]
        for (owner, _), inbox in self.inboxes.items():
            if owner != ticket and inbox.sender == ticket:
                inbox.frames.put_nowait(PeerLostError("gone"))
        for endpoint in self.endpoints.values():
            for callback in endpoint.callbacks:
                callback(ticket)


class MemoryInbox:
    def __init__(self, network: MemoryNetwork, name: tuple[str, str], key: bytes) -> None:
        self.network, self.name, self.key = network, name, key
        self.sender = ""
        self.frames: asyncio.Queue[LocalFrame | Exception] = asyncio.Queue()

    async def receive(self, timeout_s: float | None = None) -> LocalFrame:
        frame = await self.frames.get()
        if isinstance(frame, Exception):
            raise frame
        return frame

    def close(self) -> None:
        self.network.inboxes.pop(self.name, None)


@dataclass
class MemoryOutlet:
    network: MemoryNetwork
    sender: str
    ticket: str
    channel: str
    key: bytes

    async def send(self, sequence: int, tensor: Activation) -> None:
        inbox = self.network.inboxes.get((self.ticket, self.channel))
        if inbox is None or inbox.key != self.key:
            raise TransportError(f"no inbox {self.channel} at {self.ticket}")
        inbox.sender = self.sender
        self.network.log.append(f"{self.ticket} {self.channel}")
        inbox.frames.put_nowait(LocalFrame(sequence, tensor.copy()))

    def close(self) -> None: ...


class MemoryEndpoint:
    def __init__(self, network: MemoryNetwork, ticket: str) -> None:
        self.network, self.ticket = network, ticket
        self.callbacks: list[Callable[[str], None]] = []

    def open_inbox(self, channel: str, key: bytes) -> MemoryInbox:
        inbox = self.network.inboxes[self.ticket, channel] = MemoryInbox(self.network, (self.ticket, channel), key)
        return inbox

    def open_outlet(self, ticket: str, channel: str, key: bytes) -> MemoryOutlet:
        assert ticket != self.ticket, "what stays in the process does not need the transport"
        return MemoryOutlet(self.network, self.ticket, ticket, channel, key)

    def on_peer_lost(self, callback: Callable[[str], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return lambda: self.callbacks.remove(callback)
