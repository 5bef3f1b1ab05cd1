"""In which order our records are refreshed, over an overlay in memory."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from node.clock import Clock
from node.discovery.record_publisher import _BATCH, RecordPublisher
from protocol.ids import ContentId, ManifestDigest
from protocol.records import Name, Record, RecordKey, Want, name_key, wanted_key
from protocol.signing import SigningKey

N_NAMES = 3 * _BATCH


class SlowOverlay:
    """Stores nothing, and takes its time over it."""

    def __init__(self) -> None:
        self.storage = SimpleNamespace(pin=lambda key, record: None)
        self.pause_s = 0.0
        self.stored: list[str] = []
        self.on_store: Callable[[], object] = lambda: None

    async def closest(self, key: RecordKey) -> list[Any]:
        return []

    async def store(self, key: RecordKey, record: Record, nodes: Any) -> dict[Any, Any]:
        self.on_store()
        self.stored.append(type(record.payload).__name__)
        await asyncio.sleep(self.pause_s)
        return {}


async def test_a_lease_does_not_wait_behind_records_that_live_long() -> None:
    overlay = SlowOverlay()
    publisher = RecordPublisher(overlay, SigningKey.generate(), 300, Clock())  # type: ignore[arg-type]
    for number in range(N_NAMES):
        name = Name(f"name-{number}", "model", ManifestDigest("ab" * 32))
        await publisher.announce(name_key("reef", name.name), name)
    content = ContentId("cd" * 32)
    subject = await publisher.announce(wanted_key("reef", content), Want("127.0.0.1", 1), ttl_s=12)
    overlay.stored.clear()
    overlay.pause_s = 0.02
    for own in publisher._own.values():
        own.due = 0.0
    loop, lease = asyncio.get_running_loop(), publisher._own[subject]
    lease.due = math.inf

    def is_due() -> None:
        lease.due = min(lease.due, loop.time())

    overlay.on_store = is_due  # as the first batch is sent
    async with asyncio.timeout(5.0):
        await publisher._refresh()
    assert overlay.stored.index("Want") == _BATCH
    assert overlay.stored.count("Name") == N_NAMES
