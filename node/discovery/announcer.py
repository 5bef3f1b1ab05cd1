"""Our own records: sealed, pushed to the closest nodes, refreshed, handed to new neighbours, and withdrawn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from kademlia.node import Node

from node.discovery.overlay import Overlay
from node.discovery.values import KSIZE, Address
from protocol.records import Payload, Record, RecordKey, seal
from protocol.signing import SigningKey

log = logging.getLogger(__name__)

Subject = tuple[RecordKey, str, bytes]
"""Key and the record's own subject: a publisher has several names in the directory."""

_MAX_HOLDERS = 3 * KSIZE
_MAX_NEWCOMERS = 1_024
_BATCH = 16
_RETRY_S = 3.0
_CLOCK_WENT_BACK_MS = 30_000


@dataclass(slots=True)
class _Own:
    """One record that we stand for."""

    key: RecordKey
    payload: Payload
    record: Record
    """Latest, maybe not pushed yet."""
    ttl_s: int
    pushed: int = 0
    """Sequence number of the latest that was pushed."""
    holders: dict[bytes, Address] = field(default_factory=dict)
    """Id and address of the nodes that took it once; a withdrawal goes to them all."""
    failures: int = 0
    """Pushes in a row that nobody took."""
    due: float = 0.0
    """When to refresh, on the loop's clock."""
    pushing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Announcer:
    """Keeps our records in the DHT for as long as it runs."""

    def __init__(self, overlay: Overlay, key: SigningKey, ttl_s: int) -> None:
        self._overlay = overlay
        self._key = key
        self._ttl_s = ttl_s
        self._own: dict[Subject, _Own] = {}
        self._newcomers: asyncio.Queue[Node] = asyncio.Queue(_MAX_NEWCOMERS)
        self._last_sequence = 0

    def start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Begin the background work; it ends when it is cancelled."""
        return [tasks.create_task(_go_on(self._refresh)), tasks.create_task(_go_on(self._hand_over))]

    async def announce(self, key: RecordKey, payload: Payload, *, ttl_s: int | None = None) -> Subject:
        """Put a record into the DHT and keep it there. What other nodes fail to take is tried again later.

        It is found here at once, and at its closest nodes when this returns. Calls that come while an older state
        is being pushed share one push of the latest. It outlives this node by `ttl_s`, without one by the settings'.
        Raises InvalidRecordError where it is too large.
        """
        ttl_s = ttl_s or self._ttl_s
        record = self._seal(key, payload, ttl_s)
        subject = (key, *record.subject)
        own = self._own.get(subject)
        if own is not None and (own.payload, own.ttl_s) == (payload, ttl_s) and own.holders:
            return subject  # nothing new, and it is being refreshed
        if own is None:
            own = self._own[subject] = _Own(key, payload, record, ttl_s)
        own.payload, own.record, own.ttl_s = payload, record, ttl_s
        self._overlay.storage.pin(key, record)
        await self._push(own, at_least=record.sequence)
        return subject

    async def withdraw(self, subjects: Iterable[Subject]) -> None:
        """Take records back: a signed withdrawal replaces each, wherever it went."""
        gone = [own for own in (self._own.pop(subject, None) for subject in subjects) if own is not None]
        for own in gone:
            own.record = self._seal(own.key, own.payload, own.ttl_s, withdrawn=True)
            self._overlay.storage.pin(own.key, own.record)
        await asyncio.gather(*map(self._push_withdrawal, gone))

    async def withdraw_all(self, timeout_s: float) -> None:
        """For shutdown: what does not arrive in time expires by itself."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.withdraw(list(self._own))

    def welcome(self, node: Node) -> None:
        """A new contact: it gets those of our records that it is close to."""
        with contextlib.suppress(asyncio.QueueFull):  # the next refresh reaches it
            self._newcomers.put_nowait(node)

    def _seal(self, key: RecordKey, payload: Payload, ttl_s: int, *, withdrawn: bool = False) -> Record:
        now_ms = int(time.time() * 1000)
        last = self._last_sequence if self._last_sequence < now_ms + _CLOCK_WENT_BACK_MS else 0
        sequence = max(now_ms, last + 1)
        # Half a millisecond more, so that no rounding takes the sequence number back.
        record = seal(key, payload, self._key, ttl_s=ttl_s, now=(sequence + 0.5) / 1000, withdrawn=withdrawn)
        self._last_sequence = record.sequence
        return record

    async def _push(self, own: _Own, *, at_least: int) -> None:
        async with own.pushing:
            if own.pushed >= at_least:
                return
            record = own.record
            nodes = await self._overlay.closest(own.key)
            kept = await self._overlay.store(own.key, record, nodes)
            _remember(own, kept)
            own.pushed = record.sequence
            own.failures = own.failures + 1 if nodes and not kept else 0
            own.due = asyncio.get_running_loop().time() + _pause_s(own.ttl_s, own.failures)
            if own.failures == 1:
                log.warning(
                    "none of %d DHT nodes took our record %s; it is tried again. Is this machine's clock right?",
                    len(nodes),
                    type(own.payload).__name__,
                )

    async def _push_withdrawal(self, own: _Own) -> None:
        async with own.pushing:
            near = {node.id: node for node in self._overlay.neighbours(own.key)}
            holders = {id_: Node(id_, *address) for id_, address in own.holders.items()}
            await self._overlay.store(own.key, own.record, self._overlay.not_suspect((near | holders).values()))

    async def _refresh(self) -> None:
        await asyncio.sleep(min(1.0, self._ttl_s / 12))
        while due := self._due()[:_BATCH]:
            await asyncio.gather(*(self._renew(subject, own) for subject, own in due))

    def _due(self) -> list[tuple[Subject, _Own]]:
        """What is to be refreshed now, the shortest-lived first: a lease does not wait behind many shards."""
        now = asyncio.get_running_loop().time()
        due = [(subject, own) for subject, own in self._own.items() if own.due <= now and not own.pushing.locked()]
        return sorted(due, key=lambda item: item[1].ttl_s)

    async def _renew(self, subject: Subject, own: _Own) -> None:
        if self._own.get(subject) is own:
            own.record = self._seal(own.key, own.payload, own.ttl_s)
            self._overlay.storage.pin(own.key, own.record)
            await self._push(own, at_least=own.record.sequence)

    async def _hand_over(self) -> None:
        node = await self._newcomers.get()
        everything = list(self._own.items())
        for start in range(0, len(everything), _BATCH):
            await asyncio.gather(*(self._hand(*item, node) for item in everything[start : start + _BATCH]))

    async def _hand(self, subject: Subject, own: _Own, node: Node) -> None:
        near = any(neighbour.id == node.id for neighbour in self._overlay.neighbours(own.key))
        if near and self._own.get(subject) is own:
            _remember(own, await self._overlay.store(own.key, own.record, [node]))


def _pause_s(ttl_s: int, failures: int) -> float:
    pause_s = ttl_s / 3
    if failures:
        pause_s = min(pause_s, _RETRY_S * 2 ** min(failures - 1, 8))
    return pause_s * random.uniform(0.8, 1.0)


def _remember(own: _Own, kept: dict[bytes, Address]) -> None:
    for node_id, address in kept.items():
        own.holders.pop(node_id, None)
        own.holders[node_id] = address
    while len(own.holders) > _MAX_HOLDERS:
        del own.holders[next(iter(own.holders))]


async def _go_on(step: Callable[[], Awaitable[None]]) -> None:
    """Repeat a step. A defect in one must not end announcing for good."""
    while True:
        try:
            await step()
        except Exception:
            log.exception("announcing records failed; it goes on in %.0f s", _RETRY_S)
            await asyncio.sleep(_RETRY_S)
