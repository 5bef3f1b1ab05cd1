"""Tensors that are pulled by request: a peer asks by name, and gets a copy if it holds the channel's key.

A `TensorOffer` puts tensors under the name and key of a channel. A request names that channel, an address for the
answer and a tensor, and carries a proof over all of it that only a holder of the key can compute. Without the proof
it is dropped and counted, like a frame without a key. The answer comes on a channel of its own, whose key follows from
the offer's, and the tensor leaves only after the requester's inbox has answered with that key: nobody can have a
tensor sent to a third party.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
from functools import partial
from typing import Any

import numpy.typing as npt

from node.transport.channels import FrameInbox, checked_channel, checked_tensor
from node.transport.core.messages import OutletEnd
from node.transport.core.sender import Bytes
from node.transport.core.wire import MAX_NAME_BYTES, PullRequest, Reason, answer_key, pull_request
from node.transport.driver import ExchangeDriver
from node.transport.ticket import peer_of
from protocol.errors import BusyError, TimedOutError, TransportError


class TensorOffer:
    """The tensors that holders of one channel's key may pull. Made by `Pulls.offer`."""

    def __init__(self, pulls: Pulls, channel: bytes, key: bytes) -> None:
        self.key = key
        self.tensors: dict[str, tuple[list[int], str, Bytes]] = {}
        """Shape, dtype and bytes, by name."""
        self._pulls = pulls
        self._channel = channel

    def register(self, name: str, tensor: npt.NDArray[Any]) -> None:
        """Let holders of the key pull a copy of `tensor` (float32 or int32) by `name`; an earlier one is replaced.

        Raises TransportError for a tensor or name that cannot be sent or a closed offer, BusyError at the bound
        `max_registered` of the endpoint.
        """
        self._pulls.check_open(self._channel, self)
        _check_name(name)
        if name not in self.tensors:
            self._pulls.check_room()
        data, dtype = checked_tensor(0, tensor, self._pulls.max_frame_bytes)
        self.tensors[name] = list(tensor.shape), dtype, data.copy()

    def unregister(self, name: str) -> None:
        """No longer offer `name`; does nothing for an unknown one."""
        self.tensors.pop(name, None)

    def close(self) -> None:
        """Offer nothing any more: later requests are dropped as unknown."""
        self.tensors.clear()
        self._pulls.withdraw(self._channel, self)


class Pulls:
    """Both sides of pulling at one endpoint: its offers, the answers under way, and its own requests."""

    def __init__(self, driver: ExchangeDriver) -> None:
        self.max_frame_bytes = driver.settings.max_frame_bytes
        self._driver = driver
        self._offers: dict[bytes, TensorOffer] = {}
        self._answering: dict[OutletEnd, PullRequest] = {}
        driver.on_pull_request = self._requested

    def offer(self, channel: str, key: bytes) -> TensorOffer:
        """An empty offer under the name and key (16 to 64 bytes) of a channel; the channel itself need not be open.

        Raises TransportError if the channel has an offer already, BusyError at the bound `max_channels`.
        """
        self._driver.check_open()
        name = checked_channel(channel, key)
        if name in self._offers:
            raise TransportError(f"tensors of channel {channel!r} are offered already; close that offer first")
        if len(self._offers) >= self._driver.settings.max_channels:
            raise BusyError(f"{len(self._offers)} offers of tensors are open, the bound; close one first")
        offer = self._offers[name] = TensorOffer(self, name, key)
        return offer

    async def pull(self, ticket: str, channel: str, key: bytes, name: str, timeout_s: float = 30.0) -> npt.NDArray[Any]:
        """A copy of the tensor that the peer at `ticket` registered as `name` in its offer of `channel`.

        Raises TransportError if its offer has no such name or the ticket is bad; TimedOutError if it does not answer
        (it is gone, or does not offer this channel with this key); PeerLostError.
        """
        self._driver.check_open()
        _check_name(name)
        own = self._driver.node.ticket
        if peer_of(ticket) == peer_of(own):
            raise TransportError("the ticket is this endpoint's own; it has the tensor already")
        request = pull_request(key, os.urandom(8), checked_channel(channel, key), own, name)
        end = self._driver.exchange.open_inbox(request.channel, answer_key(key, request.channel))
        inbox = FrameInbox(self._driver, end, f"pull of {name!r}")
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if not end.receiver.bound:
                        self._driver.exchange.ask(ticket, request)
                        self._driver.pump()
                    with contextlib.suppress(TimedOutError):
                        return (await inbox.receive(self._driver.settings.pull_again_s)).tensor
        except TimeoutError:
            heard = "did not answer" if not end.receiver.bound else "did not send all of it"
            raise TimedOutError(f"pull of {name!r}: the peer {heard} within {timeout_s:g} s") from None
        finally:
            inbox.close()

    @property
    def registered(self) -> int:
        """Tensors that may be pulled now, over all offers."""
        return sum(len(offer.tensors) for offer in self._offers.values())

    def check_room(self) -> None:
        """Raises BusyError if no further tensor may be registered."""
        if self.registered >= self._driver.settings.max_registered:
            raise BusyError(f"{self.registered} tensors are registered, the bound; unregister one first")

    def check_open(self, channel: bytes, offer: TensorOffer) -> None:
        """Raises TransportError if the endpoint or the offer is closed."""
        self._driver.check_open()
        if self._offers.get(channel) is not offer:
            raise TransportError("the offer of tensors is closed; make another one")

    def withdraw(self, channel: bytes, offer: TensorOffer) -> None:
        """Forget an offer."""
        if self._offers.get(channel) is offer:
            del self._offers[channel]

    def _requested(self, request: PullRequest) -> None:
        counters = self._driver.exchange.table.counters
        offer = self._offers.get(request.offer)
        if offer is None:
            counters.dropped_unknown += 1
            return
        right = pull_request(offer.key, request.channel, request.offer, request.ticket, request.name)
        if not hmac.compare_digest(right.proof, request.proof):
            counters.dropped_unauthentic += 1
            return
        known = any(answered.channel == request.channel for answered in self._answering.values())
        if known or len(self._answering) >= self._driver.settings.max_serving:
            return  # the requester asks again
        key = answer_key(offer.key, request.channel)
        with contextlib.suppress(TransportError, BusyError):
            end = self._driver.exchange.open_outlet(request.ticket, request.channel, key, self._driver.now)
            self._answering[end] = request
            self._driver.listeners[end] = partial(self._answer, end)

    def _answer(self, end: OutletEnd) -> None:
        """Go on with an answer: the tensor and the end of its channel leave once the requester's inbox is there."""
        sender = end.sender
        if sender.done:
            self._answering.pop(end, None)
        elif sender.accepted and not sender.ending and not sender.blocked:
            request = self._answering[end]
            offer = self._offers.get(request.offer)
            found = offer.tensors.get(request.name) if offer is not None else None
            if found is not None:
                self._driver.offer(end, 0, *found)
            self._driver.close_outlet(end, Reason.NOT_FOUND if found is None else Reason.CLOSED)


def _check_name(name: str) -> None:
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise TransportError(f"a tensor's name has 1 to {MAX_NAME_BYTES} bytes, not {len(name.encode())}")
