"""The origins of one shard: which is asked next, which is backed off for a while, and what they answered."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Sequence

from node.clock import Clock
from node.shards.interfaces import OriginReader
from node.swarm.torrent import Torrent
from protocol.errors import OriginCorruptError, OriginError, OriginUnavailableError
from protocol.manifest import ShardEntry

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
LONGEST_BACKOFF_S = 10.0
LAYER_TIMEOUT_S = 20.0
CORRUPT_TRIES = 3
"""Answers in a row that are cut short, or of another range; wrong bytes are enough once."""


class _OriginState:
    """What is known of one origin in this fetch."""

    def __init__(self, origin: OriginReader) -> None:
        self.origin = origin
        self.is_out = False
        """Not asked again in this fetch."""
        self.backed_off_until = float("-inf")
        self.failures = 0
        """In a row."""
        self.error: OriginError | None = None
        """The last one."""
        self.layer_asked = False


class OriginSelector:
    """The origins that may have one shard, best first."""

    def __init__(self, origins: Sequence[OriginReader], entry: ShardEntry, torrent: Torrent, clock: Clock) -> None:
        self.entry = entry
        self.torrent = torrent
        self._clock = clock
        self._states = [_OriginState(origin) for origin in origins]

    @property
    def exhausted(self) -> bool:
        """Whether no origin is asked again in this fetch."""
        return all(state.is_out for state in self._states)

    @property
    def errors(self) -> dict[str, OriginError]:
        """The last error of each origin that failed, by its URL."""
        return {state.origin.url: state.error for state in self._states if state.error}

    def next_origin(self) -> OriginReader | None:
        """The best origin that is not backed off now."""
        now = self._clock.now()
        return next((one.origin for one in self._states if not one.is_out and one.backed_off_until <= now), None)

    def failed(self, origin: OriginReader, error: OriginError) -> None:
        """The origin did not give what was asked for: back off, or leave it out if another try is useless."""
        now, state = self._clock.now(), self._of(origin)
        if state.is_out:
            return  # A stream that was under way still; the error that put the origin out is the one to tell.
        if not (state.failures and _says_less(error, state.error)):
            state.error = error
        if now < state.backed_off_until:
            return  # Of several streams that broke together one counts.
        state.failures += 1
        corrupt = isinstance(error, OriginCorruptError)
        state.is_out = not (error.retryable or corrupt) or (corrupt and state.failures >= CORRUPT_TRIES)
        backoff_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (min(state.failures, 10) - 1))
        state.backed_off_until = now + backoff_s * random.uniform(0.5, 1.0)
        log.info("%s: origin %s failed: %s", self.entry.filename, origin.url, error)

    def gave_wrong(self, origin: OriginReader, what: str) -> None:
        """The origin gave bytes that are not the shard's: it is not asked again in this fetch."""
        state = self._of(origin)
        state.is_out = True
        state.error = OriginCorruptError(
            f"{origin.url} gave {what} of {self.entry.filename} (content {self.entry.content_id}) that is not what its "
            "content id says; nothing of it was kept: publish the shard there again",
            _details(origin, self.entry),
        )
        log.warning("%s", state.error)

    async def next_chunk(self, origin: OriginReader, stream: AsyncIterator[bytes], silence_s: float) -> bytes:
        """The next bytes of a stream that is not at its end. Raises OriginError if none come for `silence_s`."""
        details = _details(origin, self.entry)
        try:
            async with self._clock.timeout(silence_s):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise OriginUnavailableError(
                f"{origin.url} sent nothing of {self.entry.filename} for {silence_s:g} s", details
            ) from None
        if chunk is None:
            raise OriginCorruptError(f"{origin.url} sent less of {self.entry.filename} than asked for", details)
        self._of(origin).failures = 0
        return chunk

    async def piece_layer(self) -> bytes | None:
        """The shard's piece layer, checked, from the first origin that has it.

        Empty if none of those that answer has it, None if none answers now. A file of one piece needs none.
        """
        answered = False
        for state in self._states:
            if state.is_out or state.backed_off_until > self._clock.now():
                continue
            if state.layer_asked:
                answered = True
                continue
            try:
                layer = await self._ask_piece_layer(state.origin)
            except OriginUnavailableError as err:
                self.failed(state.origin, err)
                continue
            except OriginError as err:
                # An origin without the layer is not left out: it may have the bytes all the same.
                log.info("%s: origin %s gives no piece layer: %s", self.entry.filename, state.origin.url, err)
                state.error = state.error or err
                layer = b""
            state.layer_asked = answered = True
            if self.torrent.has_layer(layer):
                return layer
            if layer:
                log.warning("%s: origin %s has a wrong piece layer", self.entry.filename, state.origin.url)
        return b"" if answered else None

    async def _ask_piece_layer(self, origin: OriginReader) -> bytes:
        try:
            async with self._clock.timeout(LAYER_TIMEOUT_S):
                return await origin.piece_layer(self.entry)
        except TimeoutError:
            raise OriginUnavailableError(
                f"{origin.url} did not give the torrent of {self.entry.filename} within {LAYER_TIMEOUT_S:g} s",
                _details(origin, self.entry),
            ) from None

    def _of(self, origin: OriginReader) -> _OriginState:
        return next(state for state in self._states if state.origin is origin)


def _says_less(error: OriginError, known: OriginError | None) -> bool:
    """Whether an origin was silent or broke off after it had answered with a status: the status is what to tell."""
    return known is not None and bool(known.details.get("status")) and not error.details.get("status")


def _details(origin: OriginReader, entry: ShardEntry) -> dict[str, object]:
    """Of an error that is found here and not by the origin's client."""
    return {"origin": origin.url, "key": origin.key_of(entry), "status": "", "tried": 1}
