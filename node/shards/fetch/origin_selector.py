"""The origins of one shard: which is asked next, which is left alone for a while, and what they said.

Pure, but for the calls to the origins themselves: time is an argument, in seconds of any steady clock.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Sequence

from node.shards.interfaces import OriginPlace
from node.swarm.torrent import Torrent
from protocol.errors import OriginCorruptError, OriginError, OriginUnavailableError
from protocol.manifest import ShardEntry

log = logging.getLogger(__name__)

FIRST_REST_S = 0.5
LONGEST_REST_S = 10.0
LAYER_TIMEOUT_S = 20.0
CORRUPT_TRIES = 3
"""Answers in a row that are cut short, or of another range; wrong bytes are enough once."""


class _Standing:
    """What is known of one origin in this fetch."""

    def __init__(self, place: OriginPlace) -> None:
        self.place = place
        self.out = False
        """Not asked again in this fetch."""
        self.rests_until = float("-inf")
        self.failures = 0
        """In a row."""
        self.error: OriginError | None = None
        """The last one."""
        self.layer_asked = False


class Supply:
    """The origins that may have one shard, best first."""

    def __init__(self, places: Sequence[OriginPlace], entry: ShardEntry, torrent: Torrent) -> None:
        self.entry = entry
        self._torrent = torrent
        self._standings = [_Standing(place) for place in places]

    @property
    def exhausted(self) -> bool:
        """Whether no origin is asked again in this fetch."""
        return all(standing.out for standing in self._standings)

    @property
    def errors(self) -> dict[str, OriginError]:
        """What each origin that failed said last, by its URL."""
        return {standing.place.url: standing.error for standing in self._standings if standing.error}

    def next_place(self, now: float) -> OriginPlace | None:
        """The best origin that is not resting now."""
        return next((one.place for one in self._standings if not one.out and one.rests_until <= now), None)

    def failed(self, place: OriginPlace, error: OriginError, now: float) -> None:
        """It did not give what was asked for: it rests for a while, or is left out where another try is no use."""
        standing = self._of(place)
        if standing.out:
            return  # A stream that was under way still; what put the origin out is what is to be told.
        if not (standing.failures and _says_less(error, standing.error)):
            standing.error = error
        if now < standing.rests_until:
            return  # Of several streams that broke together one counts.
        standing.failures += 1
        corrupt = isinstance(error, OriginCorruptError)
        standing.out = not (error.retryable or corrupt) or (corrupt and standing.failures >= CORRUPT_TRIES)
        rest_s = min(LONGEST_REST_S, FIRST_REST_S * 2 ** (min(standing.failures, 10) - 1))
        standing.rests_until = now + rest_s * random.uniform(0.5, 1.0)
        log.info("%s: origin %s failed: %s", self.entry.filename, place.url, error)

    def gave_wrong(self, place: OriginPlace, what: str) -> None:
        """It gave bytes that are not the shard's: it is not asked again in this fetch."""
        standing = self._of(place)
        standing.out = True
        standing.error = OriginCorruptError(
            f"{place.url} gave {what} of {self.entry.filename} (content {self.entry.content_id}) that is not what its "
            "content id says; nothing of it was kept: publish the shard there again",
            _details(place, self.entry),
        )
        log.warning("%s", standing.error)

    async def next_chunk(self, place: OriginPlace, stream: AsyncIterator[bytes], silence_s: float) -> bytes:
        """What comes next of a stream that is not at its end. Raises OriginError where nothing does."""
        details = _details(place, self.entry)
        try:
            async with asyncio.timeout(silence_s):
                chunk = await anext(stream, None)
        except TimeoutError:
            raise OriginUnavailableError(
                f"{place.url} sent nothing of {self.entry.filename} for {silence_s:g} s", details
            ) from None
        if chunk is None:
            raise OriginCorruptError(f"{place.url} sent less of {self.entry.filename} than asked for", details)
        self._of(place).failures = 0
        return chunk

    async def piece_layer(self, now: float) -> bytes | None:
        """The shard's piece layer, checked, from the first origin that has it.

        Empty where none of those that answer has it, None where none answers now. A file of one piece needs none.
        """
        answered = False
        clock = asyncio.get_running_loop().time
        ahead = now - clock()
        for standing in self._standings:
            if standing.out or standing.rests_until > clock() + ahead:
                continue
            if standing.layer_asked:
                answered = True
                continue
            try:
                layer = await _piece_layer(standing.place, self.entry)
            except OriginUnavailableError as err:
                self.failed(standing.place, err, clock() + ahead)  # it may have taken long
                continue
            except OriginError as err:
                # No layer is no reason to leave the origin out: it may have the bytes all the same.
                log.info("%s: origin %s gives no piece layer: %s", self.entry.filename, standing.place.url, err)
                standing.error = standing.error or err
                layer = b""
            standing.layer_asked = answered = True
            if self._torrent.has_layer(layer):
                return layer
            if layer:
                log.warning("%s: origin %s has a wrong piece layer", self.entry.filename, standing.place.url)
        return b"" if answered else None

    def _of(self, place: OriginPlace) -> _Standing:
        return next(standing for standing in self._standings if standing.place is place)


async def _piece_layer(place: OriginPlace, entry: ShardEntry) -> bytes:
    try:
        async with asyncio.timeout(LAYER_TIMEOUT_S):
            return await place.piece_layer(entry)
    except TimeoutError:
        raise OriginUnavailableError(
            f"{place.url} did not give the torrent of {entry.filename} within {LAYER_TIMEOUT_S:g} s",
            _details(place, entry),
        ) from None


def _says_less(error: OriginError, told: OriginError | None) -> bool:
    """Whether an origin was only silent or broke off after it had answered with a status: that is what it is about."""
    return told is not None and bool(told.details.get("status")) and not error.details.get("status")


def _details(place: OriginPlace, entry: ShardEntry) -> dict[str, object]:
    """Of an error that is found here rather than told by the origin."""
    return {"origin": place.url, "key": place.key_of(entry), "status": "", "tried": 1}
