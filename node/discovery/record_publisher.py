"""This node's own records: sealed, pushed to the closest nodes, refreshed, handed to new neighbours, and withdrawn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from kademlia.node import Node

from node.clock import Clock
from node.discovery.overlay import Overlay
from node.discovery.values import KSIZE, UdpAddress
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
class _OwnRecord:
    """One record that is kept in the DHT."""

    key: RecordKey
    payload: Payload
    record: Record
    """Latest, maybe not pushed yet."""
    ttl_s: int
    pushed: int = 0
    """Sequence number of the latest that was pushed."""
    holders: dict[bytes, UdpAddress] = field(default_factory=dict)
    """Id and address of the nodes that took it; a withdrawal goes to them all."""
    failures: int = 0
    """Pushes in a row that no node took."""
    due: float = 0.0
    """When to refresh, by the publisher's clock."""
    pushing: asyncio.Lock = field(default_factory=asyncio.Lock)


class RecordPublisher:
    """Keeps this node's records in the DHT for as long as it runs."""

    def __init__(
        self,
        overlay: Overlay,
        key: SigningKey,
        ttl_s: int,
        clock: Clock,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._overlay = overlay
        self._key = key
        self._ttl_s = ttl_s
        self._clock = clock
        self._wall_clock = wall_clock
        self._own: dict[Subject, _OwnRecord] = {}
        self._newcomers: asyncio.Queue[Node] = asyncio.Queue(_MAX_NEWCOMERS)
        self._last_sequence = 0

    def start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Begin the background work; it ends when it is cancelled."""
        return [tasks.create_task(self._repeat(step)) for step in (self._refresh, self._hand_over)]

    async def announce(self, key: RecordKey, payload: Payload, *, ttl_s: int | None = None) -> Subject:
        """Put a record into the DHT and keep it there. A push that other nodes do not take is repeated later.

        It is found here at once, and at its closest nodes when this returns. Calls that come while an older state
        is being pushed share one push of the latest. It outlives this node by `ttl_s`, the settings' by default.
        Raises InvalidRecordError if it is too large.
        """
        ttl_s = ttl_s or self._ttl_s
        record = self._seal(key, payload, ttl_s)
        subject = (key, *record.subject)
        own = self._own.get(subject)
        if own is not None and (own.payload, own.ttl_s) == (payload, ttl_s) and own.holders:
            return subject  # nothing new, and it is being refreshed
        if own is None:
            own = self._own[subject] = _OwnRecord(key, payload, record, ttl_s)
        own.payload, own.record, own.ttl_s = payload, record, ttl_s
        self._overlay.storage.pin(key, record)
        await self._push(own, at_least=record.sequence)
        return subject

    async def withdraw(self, subjects: Iterable[Subject]) -> None:
        """Withdraw records: a signed withdrawal replaces each at every node that took it."""
        gone = [own for own in (self._own.pop(subject, None) for subject in subjects) if own is not None]
        for own in gone:
            own.record = self._seal(own.key, own.payload, own.ttl_s, withdrawn=True)
            self._overlay.storage.pin(own.key, own.record)
        await asyncio.gather(*map(self._push_withdrawal, gone))

    async def withdraw_all(self, timeout_s: float) -> None:
        """For shutdown: a withdrawal that does not arrive in time is left to expire."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.withdraw(list(self._own))

    def welcome(self, node: Node) -> None:
        """A new contact: it gets the own records that it is close to."""
        with contextlib.suppress(asyncio.QueueFull):  # the next refresh reaches it
            self._newcomers.put_nowait(node)

    def _seal(self, key: RecordKey, payload: Payload, ttl_s: int, *, withdrawn: bool = False) -> Record:
        now_ms = int(self._wall_clock() * 1000)
        last = self._last_sequence if self._last_sequence < now_ms + _CLOCK_WENT_BACK_MS else 0
        sequence = max(now_ms, last + 1)
        # Half a millisecond more, so that no rounding takes the sequence number back.
        record = seal(key, payload, self._key, ttl_s=ttl_s, now=(sequence + 0.5) / 1000, withdrawn=withdrawn)
        self._last_sequence = record.sequence
        return record

    async def _push(self, own: _OwnRecord, *, at_least: int) -> None:
        async with own.pushing:
            if own.pushed >= at_least:
                return
            record = own.record
            nodes = await self._overlay.closest(own.key)
            kept = await self._overlay.store(own.key, record, nodes)
            _remember(own, kept)
            own.pushed = record.sequence
            own.failures = own.failures + 1 if nodes and not kept else 0
            own.due = self._clock.now() + _pause_s(own.ttl_s, own.failures)
            if own.failures == 1:
                log.warning(
                    "none of %d DHT nodes took the own record %s; it is tried again. Is this machine's clock right?",
                    len(nodes),
                    type(own.payload).__name__,
                )

    async def _push_withdrawal(self, own: _OwnRecord) -> None:
        async with own.pushing:
            near = {node.id: node for node in self._overlay.neighbours(own.key)}
            holders = {id_: Node(id_, *address) for id_, address in own.holders.items()}
            await self._overlay.store(own.key, own.record, self._overlay.not_suspect((near | holders).values()))

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        """Repeat a step. A defect in one must not end the publishing for good."""
        while True:
            try:
                await step()
            except Exception:
                log.exception("publishing records failed; it goes on in %.0f s", _RETRY_S)
                await self._clock.sleep(_RETRY_S)

    async def _refresh(self) -> None:
        await self._clock.sleep(min(1.0, self._ttl_s / 12))
        while due := self._due()[:_BATCH]:
            await asyncio.gather(*(self._renew(subject, own) for subject, own in due))

    def _due(self) -> list[tuple[Subject, _OwnRecord]]:
        """The records to refresh now, the shortest-lived first: a want does not wait behind many shards."""
        now = self._clock.now()
        due = [(subject, own) for subject, own in self._own.items() if own.due <= now and not own.pushing.locked()]
        return sorted(due, key=lambda item: item[1].ttl_s)

    async def _renew(self, subject: Subject, own: _OwnRecord) -> None:
        if self._own.get(subject) is own:
            own.record = self._seal(own.key, own.payload, own.ttl_s)
            self._overlay.storage.pin(own.key, own.record)
            await self._push(own, at_least=own.record.sequence)

    async def _hand_over(self) -> None:
        node = await self._newcomers.get()
        everything = list(self._own.items())
        for start in range(0, len(everything), _BATCH):
            await asyncio.gather(*(self._hand(*item, node) for item in everything[start : start + _BATCH]))

    async def _hand(self, subject: Subject, own: _OwnRecord, node: Node) -> None:
        near = any(neighbour.id == node.id for neighbour in self._overlay.neighbours(own.key))
        if near and self._own.get(subject) is own:
            _remember(own, await self._overlay.store(own.key, own.record, [node]))


def _pause_s(ttl_s: int, failures: int) -> float:
    pause_s = ttl_s / 3
    if failures:
        pause_s = min(pause_s, _RETRY_S * 2 ** min(failures - 1, 8))
    return pause_s * random.uniform(0.8, 1.0)


def _remember(own: _OwnRecord, kept: dict[bytes, UdpAddress]) -> None:
    for node_id, address in kept.items():
        own.holders.pop(node_id, None)
        own.holders[node_id] = address
    while len(own.holders) > _MAX_HOLDERS:
        del own.holders[next(iter(own.holders))]
