"""Feeds a download from the origin: this node's part of the pieces that no peer has, each checked before it is given.

It comes in where peers do not get the shard here: none was found, they are gone, or they are slow. From then on it
stays beside them to the end of the download.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from node.shards.lease import Block, blocks_of, choose
from node.shards.need import Need
from node.shards.ports import Download, OriginPlace
from node.shards.settings import ShardsSettings
from node.shards.sources import Sources
from node.shards.supply import Supply
from node.shards.wanting import Wanting
from node.swarm.layer import piece_fits
from node.swarm.torrent import Torrent
from protocol.errors import InternalError, OriginError, ShoalError

log = logging.getLogger(__name__)

TICK_S = 0.25
MAX_STREAMS = 4
MAX_IN_FLIGHT_BYTES = 32 * 1024 * 1024
"""Of pieces in memory: each stream has at most a chunk, a begun piece and one that is being given."""
UNSTICK_S = 5.0
"""Where nothing moves for so long, pieces that a peer has but does not give are taken too."""
STUCK_S = 15.0
"""Where nothing moves for so long, blocks of others are taken too, one after the other."""
LAST_LOOK_S = 5.0
"""Where every origin refused and no peer is known, one may still be announcing itself."""
FIRST_LAYER_S = 3.0
"""How long an origin may hold up the beginning of a download that peers could feed as well."""
GIVE_TIMEOUT_S = 30.0
GIVE_TRIES = 5


class WholeNeededError(Exception):
    """Raised when no origin has the piece layer and no peer a piece: this node is to take the shard whole."""


class Feeder:
    """The origin's part of one fetch, over every download that the fetch begins."""

    def __init__(
        self,
        settings: ShardsSettings,
        torrent: Torrent,
        sources: Sources,
        supply: Supply,
        wanting: Wanting,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.supply = supply
        self.begun = False
        """Whether the origin is asked."""
        self.origin_bytes = 0
        """Payload that came from origins."""
        self.kept_bytes = 0
        """Of pieces from origins that were not here yet."""
        self._settings = settings
        self._torrent = torrent
        self._blocks = blocks_of(torrent)
        self._sources = sources
        self._wanting = wanting
        self._tasks = tasks
        self._listening: asyncio.Task[None] | None = None
        self._need = Need(
            _now(),
            gone_after_s=2 * settings.origin_after_s,  # how many are connected is known half a second late
            slow_bytes_s=settings.slow_bytes_s,
            slow_after_s=settings.slow_after_s,
        )
        self._partial: dict[int, bytearray] = {}
        """Piece -> what came of it; a stream that breaks goes on from there."""
        self._giver: dict[int, OriginPlace] = {}
        """Piece -> who gave the latest of its bytes."""
        self._streams: dict[int, asyncio.Task[None]] = {}
        self._missing: set[int] = set()
        self._available: frozenset[int] = frozenset()
        self._wake = asyncio.Event()
        self._most = 0
        self._moved_at = _now()
        block_bytes = max(len(block.pieces) for block in self._blocks) * torrent.piece_length
        self._max_streams = max(1, min(MAX_STREAMS, MAX_IN_FLIGHT_BYTES // (2 * block_bytes)))

    @property
    def pending_bytes(self) -> int:
        """Of pieces that came in part."""
        return sum(map(len, self._partial.values()))

    @property
    def account(self) -> str:
        """How far it came, for a message."""
        return f"{self._most} of {self._torrent.size} bytes came, then none for {self.idle_s:.0f} s"

    @property
    def idle_s(self) -> float:
        """How long nothing came, from wherever."""
        return _now() - self._moved_at

    def begin(self) -> None:
        """The origin is needed: tell the others that want the shard too."""
        if not self.begun:
            self.begun = True
            self._moved_at = _now()
            self._listening = self._tasks.create_task(self._wanting.run(), name=f"want {self.supply.entry.filename}")

    def close(self) -> None:
        """The fetch is over."""
        if self._listening:
            self._listening.cancel()

    async def first_layer(self) -> bytes:
        """The piece layer, if an origin gives it at the first try and soon."""
        if self._torrent.pieces > 1:
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_LAYER_S):
                    return await self.supply.piece_layer(_now()) or b""
        return b""

    async def feed(self, download: Download) -> None:
        """Help a download for as long as it takes; ends by being cancelled.

        Raises WholeNeededError, and where nothing came from anywhere for too long an OriginError or NoSourceError that
        says what was tried.
        """
        await download.ready()
        self._moved_at = _now()
        while not self.begun:
            self._observe(download)
            if self._need.gone(_now()) or self._need.slow(_now()):
                log.info("%s: peers are gone or slow, the origin helps", self.supply.entry.filename)
                self.begin()
            else:
                await asyncio.sleep(TICK_S)
        failure: Exception | None = None
        async with asyncio.TaskGroup() as streams:
            try:
                await self._go_on(download, streams)
            except (ShoalError, WholeNeededError) as err:
                failure = err  # The group would wrap it.
            finally:
                for stream in self._streams.values():
                    stream.cancel()
        if failure:
            raise failure

    async def _go_on(self, download: Download, streams: asyncio.TaskGroup) -> None:
        await self._wanting.settled()
        told: set[object] = set()
        while True:
            self._wake.clear()
            for node_id, addresses in self._wanting.peers.items():
                if addresses and node_id not in told:
                    told.add(node_id)
                    download.add_peers(addresses)
            self._observe(download)
            if self._torrent.pieces == 1 or download.piece_layer:
                await self._plan(download, streams)
            else:
                await self._seek_layer(download)
            if self.idle_s >= self._patience_s(download) and download.missing_pieces():
                raise self._sources.failed(self.account, self.supply)
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()

    def _observe(self, download: Download) -> None:
        now, seen = _now(), download.progress()
        if seen.bytes_done > self._most:
            self._most, self._moved_at = seen.bytes_done, now
        self._need.saw(now, seen.bytes_done - self.kept_bytes, seen.peers)

    def _patience_s(self, download: Download) -> float:
        alone = not download.progress().peers and not self._wanting.lease.others
        if self.supply.exhausted and alone:
            return min(self._settings.find_timeout_s, LAST_LOOK_S)
        return self._settings.stall_timeout_s

    async def _seek_layer(self, download: Download) -> None:
        """Have the piece layer from an origin, unless peers give it meanwhile. Raises WholeNeededError."""
        layer = await self.supply.piece_layer(_now())
        if layer:
            await download.take_layer(layer)
            return
        if layer is None or await download.available_pieces():
            return
        if not self._wanting.lease.owns(0):
            self._moved_at = _now()  # Another takes it whole, and gives up before long if nothing comes.
            return
        await self._sources.look_up()
        if not (self._sources.whole or download.piece_layer or self.supply.exhausted):
            raise WholeNeededError

    async def _plan(self, download: Download, streams: asyncio.TaskGroup) -> None:
        self._missing = {piece.index for piece in download.missing_pieces()}
        self._available = await download.available_pieces()
        busy = {index for block in self._streams for index in self._blocks[block].pieces}
        for index in self._partial.keys() - self._missing - busy:
            del self._partial[index]  # A peer was faster.
        stuck = self.idle_s >= STUCK_S
        while len(self._streams) < (1 if stuck else self._max_streams) and self.supply.next_place(_now()):
            block = choose(
                self._wanting.lease,
                self._blocks,
                missing=self._missing,
                available=self._available,
                busy=self._streams,
                peers_fail=self._peers_fail(),
                stuck=stuck,
            )
            if block is None:
                return
            self._streams[block] = streams.create_task(self._take(block, download), name=f"origin block {block}")

    def _peers_fail(self) -> bool:
        return self.idle_s >= UNSTICK_S or self._need.slow(_now())

    async def _take(self, number: int, download: Download) -> None:
        """Have the missing pieces of a block, or what of them an origin gives before it fails."""
        try:
            while (place := self.supply.next_place(_now())) and (run := self._next_run(self._blocks[number])):
                try:
                    await self._stream(place, run, download)
                except OriginError as err:
                    self.supply.failed(place, err, _now())
        except ShoalError as err:
            # The download has ended, and says so itself.
            log.info("%s", err)
        finally:
            del self._streams[number]
            self._wake.set()

    def _next_run(self, block: Block) -> Block | None:
        """The next adjacent pieces of a block that are to be taken."""
        leave = frozenset[int]() if self._peers_fail() else self._available
        wanted = [index for index in block.pieces if index in self._missing and index not in leave]
        if not wanted:
            return None
        end = wanted[0]
        while end in wanted:
            end += 1
        return Block(wanted[0], end)

    async def _stream(self, place: OriginPlace, run: Block, download: Download) -> None:
        """Take adjacent pieces in one request; what came of a piece before a failure is kept for the next request."""
        index = run.first
        partial = self._partial.setdefault(index, bytearray())
        mixed = bool(partial) and self._giver.get(index) is not place
        last = self._torrent.piece(run.end - 1)
        start = self._torrent.piece(index).offset + len(partial)
        stream = place.stream(self.supply.entry, start, last.offset + last.size)
        try:
            while index < run.end:
                chunk = await self.supply.next_chunk(place, stream, self._settings.stall_timeout_s / 2)
                self.origin_bytes += len(chunk)
                self._moved_at = _now()
                partial += chunk
                self._giver[index] = place
                while index < run.end and len(partial) >= (size := self._torrent.piece(index).size):
                    data = bytes(partial[:size])
                    if not await asyncio.to_thread(piece_fits, self._torrent, download.piece_layer, index, data):
                        self._partial.pop(index, None)
                        if not mixed:  # else it is not known whose bytes are wrong: the next try is of one place
                            self.supply.gave_wrong(place, f"a piece {index}")
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
        new = index in self._missing
        for _ in range(GIVE_TRIES):
            with suppress(TimeoutError):
                async with asyncio.timeout(GIVE_TIMEOUT_S):
                    if await download.add_piece(index, data):
                        self.kept_bytes += new * len(data)
                        self._missing.discard(index)
                        return
        raise InternalError(f"the swarm does not take piece {index} of {self.supply.entry.filename}")


def _now() -> float:
    return asyncio.get_running_loop().time()
