"""Takes this node's blocks of the pieces that no peer has from an origin, and gives each to the download, checked.

The feeder begins if peers do not get the shard here: none was found, they are gone, or they are slow (`PeerRate`). From
then on it works beside them to the end of the download. `PieceStreams` reads pieces from origins, `TransferTimes` knows
when bytes last came.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection
from contextlib import suppress

from node.background import FirstErrorGroup
from node.clock import Clock
from node.shards.fetch.block_assignment import Block
from node.shards.fetch.origin_selector import OriginSelector
from node.shards.fetch.providers import Providers
from node.shards.fetch.want_announcer import WantAnnouncer
from node.shards.interfaces import DownloadHandle, OriginReader
from node.shards.settings import ShardsSettings
from node.swarm.piece_layer import piece_fits
from protocol.errors import InternalError, OriginError, ShoalError

log = logging.getLogger(__name__)

TICK_S = 0.25
MAX_STREAMS = 4
MAX_UNIT_STREAMS = 2
"""If each stream reads, and holds, a long unit at a time."""
LEAST_UNIT_BYTES_S = 256 * 1024
"""An origin that reads in units and is slower than this counts as silent."""
MAX_IN_FLIGHT_BYTES = 32 * 1024 * 1024
"""Of pieces in memory: each stream has at most a chunk, a piece that came in part and one that is being given."""
UNSTICK_S = 5.0
"""If nothing moves for so long, pieces that a peer has but does not give are taken too."""
STUCK_S = 15.0
"""If nothing comes for so long but blocks of other nodes, those are taken too, one after the other."""
LAST_LOOK_S = 5.0
"""If every origin refused and no peer is known, one may still be announcing itself."""
FIRST_LAYER_S = 3.0
"""How long an origin may hold up the beginning of a download that peers could feed as well."""
GIVE_TIMEOUT_S = 30.0
GIVE_TRIES = 5


class WholeFileNeededError(Exception):
    """Raised when no origin has the piece layer and no peer a piece: this node is to take the shard whole."""


class OriginFeeder:
    """The origin's part of one fetch, over every download that the fetch begins."""

    def __init__(
        self,
        settings: ShardsSettings,
        providers: Providers,
        selector: OriginSelector,
        want_announcer: WantAnnouncer,
        tasks: asyncio.TaskGroup,
        clock: Clock,
        *,
        unit_bytes: int,
    ) -> None:
        """`unit_bytes`: the origin reads nothing shorter, 1 if it reads any range."""
        self.selector = selector
        self.begun = False
        """Whether the origin is asked."""
        self.lull_s = unit_bytes / LEAST_UNIT_BYTES_S if unit_bytes > 1 else 0.0
        """How long an origin that works may be silent: it gives nothing before a whole unit came."""
        self._settings = settings
        self._torrent = torrent = selector.torrent
        self._providers = providers
        self._want_announcer = want_announcer
        self._assignment = want_announcer.assignment
        self._tasks = tasks
        self._clock = clock
        self._announcing: asyncio.Task[None] | None = None
        self._peer_rate = PeerRate(
            clock.now(),
            gone_after_s=2 * settings.origin_after_s,  # how many are connected is known half a second late
            slow_bytes_s=settings.slow_bytes_s,
            slow_after_s=settings.slow_after_s,
        )
        self._streams: dict[int, asyncio.Task[None]] = {}
        """Block -> the task that takes it."""
        self._missing: set[int] = set()
        self._available: frozenset[int] = frozenset()
        self._wake = asyncio.Event()
        self._next_look_up_at = float("-inf")
        self._times = TransferTimes(clock.now())
        silence_s = settings.stall_timeout_s / 2 + self.lull_s
        self._pieces = PieceStreams(selector, self._times, self._missing, clock, silence_s)
        most = MAX_STREAMS if unit_bytes == 1 else MAX_UNIT_STREAMS
        self._max_streams = max(1, min(most, MAX_IN_FLIGHT_BYTES // (2 * torrent.piece_length)))

    @property
    def origin_bytes(self) -> int:
        """Payload that came from origins."""
        return self._pieces.origin_bytes

    @property
    def kept_bytes(self) -> int:
        """Of pieces from origins that were not here yet."""
        return self._times.given_bytes

    @property
    def pending_bytes(self) -> int:
        """Of pieces that came in part."""
        return self._pieces.pending_bytes

    @property
    def saw_other_fetchers(self) -> bool:
        """Whether other nodes fetch the shard too, or did."""
        return bool(self._want_announcer.peers)

    @property
    def idle_s(self) -> float:
        """How long no byte came, from peers or origins."""
        return self._clock.now() - self._times.moved_at

    def begin(self) -> None:
        """The origin is needed: announce it to the other nodes that want the shard too."""
        if not self.begun:
            self.begun = True
            self._times.moved_at = self._clock.now()
            name = f"want {self.selector.entry.filename}"
            self._announcing = self._tasks.create_task(self._want_announcer.run(), name=name)

    def close(self) -> None:
        """The fetch is over."""
        if self._announcing:
            self._announcing.cancel()

    async def first_layer(self) -> bytes:
        """The piece layer, if an origin gives it at the first try and soon."""
        if self._torrent.pieces > 1:
            with suppress(TimeoutError):
                async with self._clock.timeout(FIRST_LAYER_S):
                    return await self.selector.piece_layer() or b""
        return b""

    async def feed(self, download: DownloadHandle) -> None:
        """Help a download until the caller cancels.

        Raises WholeFileNeededError; and, if nothing came from anywhere for too long, an OriginError or NoSourceError
        that says what was tried.
        """
        await download.ready()
        self._times.restart(self._clock.now())
        while not self.begun:
            self._observe(download)
            if self._peer_rate.is_gone(self._clock.now()) or self._peer_rate.is_slow(self._clock.now()):
                log.info("%s: peers are gone or slow, the origin helps", self.selector.entry.filename)
                self.begin()
            else:
                await self._clock.sleep(TICK_S)
        async with FirstErrorGroup() as streams:
            try:
                await self._feed(download, streams)
            finally:
                for stream in self._streams.values():
                    stream.cancel()

    async def _feed(self, download: DownloadHandle, streams: asyncio.TaskGroup) -> None:
        await self._want_announcer.settled()
        added: set[object] = set()
        while True:
            self._wake.clear()
            for node_id, addresses in self._want_announcer.peers.items():
                if addresses and node_id not in added:
                    added.add(node_id)
                    download.add_peers(addresses)
            self._observe(download)
            self._want_announcer.takes_blocks = not self.selector.exhausted
            if self._torrent.pieces == 1 or download.piece_layer:
                await self._start_streams(download, streams)
            else:
                await self._find_layer(download)
            if self.idle_s >= self._patience_s(download) and download.missing_pieces():
                came = f"{self._times.most} of {self._torrent.size} bytes came, then none for {self.idle_s:.0f} s"
                raise self._providers.no_source_or_origin(came, self.selector.errors)
            with suppress(TimeoutError):
                async with self._clock.timeout(TICK_S):
                    await self._wake.wait()

    def _observe(self, download: DownloadHandle) -> None:
        now, progress = self._clock.now(), download.progress()
        self._times.observe(now, progress.bytes_done)
        self._peer_rate.observe(now, self._times.peer_bytes, progress.peers)

    def _patience_s(self, download: DownloadHandle) -> float:
        is_alone = not download.progress().peers and not self._assignment.others
        if self.selector.exhausted and is_alone:
            return min(self._settings.find_timeout_s, LAST_LOOK_S)
        return self._settings.stall_timeout_s + self.lull_s

    async def _find_layer(self, download: DownloadHandle) -> None:
        """Have the piece layer from an origin, unless peers give it meanwhile. Raises WholeFileNeededError."""
        layer = await self.selector.piece_layer()
        if layer:
            await download.take_layer(layer)
            return
        if layer is None or await download.available_pieces():
            return
        if not self._assignment.owns(0):
            self._times.moved_at = self._clock.now()  # Its owner takes it whole, and gives up before long if it cannot.
            return
        if self._clock.now() < self._next_look_up_at:
            return
        self._next_look_up_at = self._clock.now() + self._settings.relookup_s
        download.add_peers(await self._providers.look_up())
        if download.piece_layer or self.selector.exhausted:
            return
        if not self._providers.any_complete or self.idle_s >= UNSTICK_S:  # a record outlives its node
            raise WholeFileNeededError

    async def _start_streams(self, download: DownloadHandle, streams: asyncio.TaskGroup) -> None:
        self._missing.clear()
        self._missing.update(piece.index for piece in download.missing_pieces())
        self._available = await download.available_pieces()
        busy = {index for block in self._streams for index in self._assignment.blocks[block].pieces}
        self._pieces.forget_all_but(self._missing | busy)
        stuck = self._clock.now() - self._times.shared_at >= STUCK_S + self.lull_s
        while len(self._streams) < (1 if stuck else self._max_streams) and self.selector.next_origin():
            block = self._assignment.next_block(
                missing=self._missing,
                available=self._available,
                busy=self._streams,
                peers_fail=self._peers_fail(),
                stuck=stuck,
            )
            if block is None:
                return
            self._streams[block] = streams.create_task(self._take_block(block, download), name=f"origin block {block}")

    def _peers_fail(self) -> bool:
        return self.idle_s >= UNSTICK_S + self.lull_s or self._peer_rate.is_slow(self._clock.now())

    async def _take_block(self, number: int, download: DownloadHandle) -> None:
        """Take the missing pieces of a block, or what of them an origin gives before it fails."""
        block = self._assignment.blocks[number]
        try:
            while (origin := self.selector.next_origin()) and (run := self._next_run(block)):
                try:
                    await self._pieces.read(origin, run, download, shared=self._assignment.owns(number))
                except OriginError as err:
                    self.selector.failed(origin, err)
        except ShoalError as err:
            # The download has ended, and says so itself.
            log.info("%s", err)
        finally:
            del self._streams[number]
            self._wake.set()

    def _next_run(self, block: Block) -> Block | None:
        """The next adjacent pieces of a block that are to be taken."""
        left_to_peers = frozenset[int]() if self._peers_fail() else self._available
        wanted = [index for index in block.pieces if index in self._missing and index not in left_to_peers]
        if not wanted:
            return None
        end = wanted[0]
        while end in wanted:
            end += 1
        return Block(wanted[0], end)


class PieceStreams:
    """Reads pieces from origins as streams; each is checked before the download gets it."""

    def __init__(
        self, selector: OriginSelector, times: TransferTimes, missing: set[int], clock: Clock, silence_s: float
    ) -> None:
        """`missing`, the pieces that are not here, is kept by the feeder; a piece that is given leaves it here."""
        self.origin_bytes = 0
        """Payload that came from origins."""
        self._selector = selector
        self._torrent = selector.torrent
        self._times = times
        self._missing = missing
        self._clock = clock
        self._silence_s = silence_s
        self._partial: dict[int, bytearray] = {}
        """Piece -> its bytes so far; after a stream breaks, the next one goes on from there."""
        self._giver: dict[int, OriginReader] = {}
        """Piece -> the origin that gave the latest of its bytes."""

    @property
    def pending_bytes(self) -> int:
        """Of pieces that came in part."""
        return sum(map(len, self._partial.values()))

    def forget_all_but(self, pieces: Collection[int]) -> None:
        """A peer was faster with all other pieces."""
        for index in self._partial.keys() - set(pieces):
            del self._partial[index]

    async def read(self, origin: OriginReader, run: Block, download: DownloadHandle, *, shared: bool) -> None:
        """Read adjacent pieces in one request; the bytes of a piece that came before a failure are kept for the next.

        `shared`: whether the block is this node's own. Raises OriginError, and what the download raises.
        """
        index = run.first
        partial = self._partial.setdefault(index, bytearray())
        mixed = bool(partial) and self._giver.get(index) is not origin
        last = self._torrent.piece(run.end - 1)
        start = self._torrent.piece(index).offset + len(partial)
        stream = origin.stream(self._selector.entry, start, last.offset + last.size)
        try:
            while index < run.end:
                chunk = await self._selector.next_chunk(origin, stream, self._silence_s)
                self.origin_bytes += len(chunk)
                self._times.chunk_came(self._clock.now(), shared=shared)
                partial += chunk
                self._giver[index] = origin
                while index < run.end and len(partial) >= (size := self._torrent.piece(index).size):
                    data = bytes(partial[:size])
                    if not await asyncio.to_thread(piece_fits, self._torrent, download.piece_layer, index, data):
                        self._partial.pop(index, None)
                        if not mixed:  # else it is not known whose bytes are wrong: the next try is of one origin
                            self._selector.gave_wrong(origin, f"a piece {index}")
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

    async def _give(self, download: DownloadHandle, index: int, data: bytes) -> None:
        """Give a checked piece to the download, also while the download is being restarted."""
        given_bytes = len(data) if index in self._missing else 0
        self._times.given_bytes += given_bytes  # before the download has it: from then on it would count as a peer's
        kept = False
        try:
            for _ in range(GIVE_TRIES):
                with suppress(TimeoutError):
                    async with self._clock.timeout(GIVE_TIMEOUT_S):
                        kept = await download.add_piece(index, data)
                if kept:
                    self._missing.discard(index)
                    return
        finally:
            if not kept:
                self._times.given_bytes -= given_bytes
        raise InternalError(f"the swarm does not take piece {index} of {self._selector.entry.filename}")


class TransferTimes:
    """When bytes of one shard last came, over every download that its fetch begins. Pure; times in seconds."""

    def __init__(self, now: float) -> None:
        self.most = 0
        """The most bytes that were here at a time."""
        self.moved_at = now
        """When anything came, from peers or origins."""
        self.shared_at = now
        """When anything came that respects the block assignment: this node's own blocks, and what peers gave."""
        self.given_bytes = 0
        """Of pieces from origins that were not here yet, those that are being given among them."""
        self.peer_bytes = 0
        """That peers gave, or an earlier try: the most that it was, since a piece is given before it is here."""

    def restart(self, now: float) -> None:
        """A download begins: it is given time."""
        self.moved_at = self.shared_at = now

    def chunk_came(self, now: float, *, shared: bool) -> None:
        """A chunk came from an origin; `shared`: of a block that the assignment gives to this node."""
        self.moved_at = now
        if shared:
            self.shared_at = now

    def observe(self, now: float, bytes_done: int) -> None:
        """So many checked bytes are here."""
        if bytes_done > self.most:
            self.most, self.moved_at = bytes_done, now
        if bytes_done - self.given_bytes > self.peer_bytes:
            self.peer_bytes, self.shared_at = bytes_done - self.given_bytes, now


class PeerRate:
    """Whether peers give enough of a download, or the origin is to help. Pure; times in seconds."""

    def __init__(self, now: float, *, gone_after_s: float, slow_bytes_s: float, slow_after_s: float) -> None:
        self._gone_after_s = gone_after_s
        self._slow_bytes_s = slow_bytes_s
        self._slow_after_s = slow_after_s
        self._connected_at = now
        self._samples: deque[tuple[float, int]] = deque()

    def observe(self, now: float, peer_bytes: int, peers: int) -> None:
        """So many bytes came from peers so far, and so many peers are connected."""
        if peers:
            self._connected_at = now
        if not self._samples or now - self._samples[-1][0] >= self._slow_after_s / 20:
            self._samples.append((now, peer_bytes))
        while len(self._samples) > 1 and now - self._samples[1][0] >= self._slow_after_s:
            self._samples.popleft()

    def is_gone(self, now: float) -> bool:
        """Whether no peer was connected for `gone_after_s`."""
        return now - self._connected_at >= self._gone_after_s

    def is_slow(self, now: float) -> bool:
        """Whether peers gave less than `slow_bytes_s` over the last `slow_after_s`, the time that they are given."""
        if not self._samples or now - self._samples[0][0] < self._slow_after_s:
            return False
        (began, before), (_, after) = self._samples[0], self._samples[-1]
        return after - before < self._slow_bytes_s * (now - began)
