"""The endpoint: opens channels, and offers and pulls tensors."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

from node.transport.channels import FrameInbox, FrameOutlet, checked_channel
from node.transport.driver import ExchangeDriver
from node.transport.pull import Pulls
from node.transport.settings import TransportSettings
from node.transport.stats import TransportStats


class IrohEndpoint:
    """One tensor_iroh endpoint with its channels. Made by `open`."""

    def __init__(self, settings: TransportSettings) -> None:
        self._settings = settings
        self._driver = ExchangeDriver(settings)
        self.pulls = Pulls(self._driver)
        """Tensors that peers may pull from here, and pulling from peers."""
        self.ticket = ""
        """Where others reach this endpoint: an iroh node ticket. It does not change while the endpoint is open."""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: TransportSettings | None = None) -> AsyncIterator[IrohEndpoint]:
        """Bind an endpoint, and close it at the end: what was sent is given `close_timeout_s` to arrive.

        Raises TransportError if it cannot be bound, UnsupportedPlatformError on a platform without a wheel of
        tensor_iroh.
        """
        endpoint = cls(settings if settings is not None else TransportSettings())
        try:
            endpoint.ticket = await endpoint._driver.start()
            yield endpoint
        finally:
            await endpoint._driver.close()

    def open_inbox(self, channel: str, key: bytes) -> FrameInbox:
        """Take frames of `channel` from whoever holds `key` (16 to 64 bytes). One inbox a channel, one sender an inbox.

        Raises TransportError for a channel that is open, BusyError at the bound.
        """
        self._driver.check_open()
        return FrameInbox(self._driver, self._driver.exchange.open_inbox(checked_channel(channel, key), key), channel)

    def open_outlet(self, ticket: str, channel: str, key: bytes) -> FrameOutlet:
        """Send frames to the inbox of `channel` at `ticket`. The connection is made at once, in the background.

        Raises TransportError for a bad ticket, BusyError at the bound.
        """
        driver = self._driver
        driver.check_open()
        end = driver.exchange.open_outlet(ticket, checked_channel(channel, key), key, driver.now)
        outlet = FrameOutlet(driver, end, channel, ticket, self._settings.open_timeout_s + self._settings.lost_after_s)
        driver.pump()
        return outlet

    def on_peer_lost(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call `callback(ticket)` when a peer is noticed to be gone. Returns a function that removes the callback."""
        callbacks = self._driver.on_peer_lost
        callbacks.append(callback)
        return lambda: callbacks.remove(callback) if callback in callbacks else None

    def stats(self) -> TransportStats:
        """Counters, and what is open and in flight now."""
        return self._driver.exchange.table.stats(self.pulls.registered)
