"""Takes pieces of a shard from origins: as streams, each piece checked before it is given to the download."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress

from node.shards.fetch.block_assignment import Block
from node.shards.fetch.flow import Flow
from node.shards.fetch.origin_selector import Supply
from node.shards.interfaces import Download, OriginPlace
from node.swarm.piece_layer import piece_fits
from node.swarm.torrent import Torrent
from protocol.errors import InternalError

GIVE_TIMEOUT_S = 30.0
GIVE_TRIES = 5


class Taking:
    """What came of each piece so far; `missing` is kept right by the feeder, and here where a piece was given."""

    def __init__(self, torrent: Torrent, supply: Supply, flow: Flow, missing: set[int], silence_s: float) -> None:
        self.origin_bytes = 0
        """Payload that came from origins."""
        self._torrent = torrent
        self._supply = supply
        self._flow = flow
        self._missing = missing
        self._silence_s = silence_s
        self._partial: dict[int, bytearray] = {}
        """Piece -> what came of it; a stream that breaks goes on from there."""
        self._giver: dict[int, OriginPlace] = {}
        """Piece -> who gave the latest of its bytes."""

    @property
    def pending_bytes(self) -> int:
        """Of pieces that came in part."""
        return sum(map(len, self._partial.values()))

    def forget_but(self, pieces: Collection[int]) -> None:
        """A peer was faster with all other pieces."""
        for index in self._partial.keys() - set(pieces):
            del self._partial[index]

    async def take(self, place: OriginPlace, run: Block, download: Download, *, shared: bool) -> None:
        """Take adjacent pieces in one request; what came of a piece before a failure is kept for the next request.

        `shared`: whether the block is this node's own. Raises OriginError, and what the download raises.
        """
        index = run.first
        partial = self._partial.setdefault(index, bytearray())
        mixed = bool(partial) and self._giver.get(index) is not place
        last = self._torrent.piece(run.end - 1)
        start = self._torrent.piece(index).offset + len(partial)
        stream = place.stream(self._supply.entry, start, last.offset + last.size)
        try:
            while index < run.end:
                chunk = await self._supply.next_chunk(place, stream, self._silence_s)
                self.origin_bytes += len(chunk)
                self._flow.came(asyncio.get_running_loop().time(), shared=shared)
                partial += chunk
                self._giver[index] = place
                while index < run.end and len(partial) >= (size := self._torrent.piece(index).size):
                    data = bytes(partial[:size])
                    if not await asyncio.to_thread(piece_fits, self._torrent, download.piece_layer, index, data):
                        self._partial.pop(index, None)
                        if not mixed:  # else it is not known whose bytes are wrong: the next try is of one place
                            self._supply.gave_wrong(place, f"a piece {index}")
                        return
                    await self._give(download, index, data)
                    self._partial.pop(index, None)
                    index, mixed = index + 1, False
                    if index < run.end and index not in self._missing:
                        return  # A peer was faster.
                    if index < run.end:
                        partial = self._partial[index] = partial[size:]
        finally:
            if close := getattr(stream, "aclose", None):
                await close()

    async def _give(self, download: Download, index: int, data: bytes) -> None:
        """Hand a piece that was checked to the download, also while that is being begun anew."""
        given_bytes = len(data) if index in self._missing else 0
        self._flow.given_bytes += given_bytes  # before: from the moment that it is here it is no peer's
        kept = False
        try:
            for _ in range(GIVE_TRIES):
                with suppress(TimeoutError):
                    async with asyncio.timeout(GIVE_TIMEOUT_S):
                        kept = await download.add_piece(index, data)
                if kept:
                    self._missing.discard(index)
                    return
        finally:
            if not kept:
                self._flow.given_bytes -= given_bytes
        raise InternalError(f"the swarm does not take piece {index} of {self._supply.entry.filename}")
