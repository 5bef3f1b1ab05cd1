"""Feeds a download from the origin: this node's part of the pieces that no peer has, each checked before it is given.

It comes in where peers do not get the shard here: none was found, they are gone, or they are slow. From then on it
stays beside them to the end of the download.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

from node.shards.fetch.block_assignment import Block, choose
from node.shards.fetch.flow import Flow
from node.shards.fetch.need import Need
from node.shards.fetch.origin_selector import Supply
from node.shards.fetch.providers import Sources
from node.shards.fetch.taking import Taking
from node.shards.fetch.want_announcer import Wanting
from node.shards.interfaces import Download
from node.shards.settings import ShardsSettings
from node.swarm.torrent import Torrent
from protocol.errors import OriginError, ShoalError

log = logging.getLogger(__name__)

TICK_S = 0.25
MAX_STREAMS = 4
MAX_UNIT_STREAMS = 2
"""Where each reads, and holds, a long unit at a time."""
LEAST_UNIT_BYTES_S = 256 * 1024
"""An origin that reads in units and is slower than this counts as silent."""
MAX_IN_FLIGHT_BYTES = 32 * 1024 * 1024
"""Of pieces in memory: each stream has at most a chunk, a begun piece and one that is being given."""
UNSTICK_S = 5.0
"""Where nothing moves for so long, pieces that a peer has but does not give are taken too."""
STUCK_S = 15.0
"""Where nothing comes for so long but blocks of others, those are taken too, one after the other."""
LAST_LOOK_S = 5.0
"""Where every origin refused and no peer is known, one may still be announcing itself."""
FIRST_LAYER_S = 3.0
"""How long an origin may hold up the beginning of a download that peers could feed as well."""


class WholeNeededError(Exception):
    """Raised when no origin has the piece layer and no peer a piece: this node is to take the shard whole."""


class Feeder:
    """The origin's part of one fetch, over every download that the fetch begins."""

    def __init__(
        self,
        settings: ShardsSettings,
        torrent: Torrent,
        blocks: Sequence[Block],
        unit_bytes: int,
        sources: Sources,
        supply: Supply,
        wanting: Wanting,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.supply = supply
        self.begun = False
        """Whether the origin is asked."""
        self.lull_s = unit_bytes / LEAST_UNIT_BYTES_S if unit_bytes > 1 else 0.0
        """How long an origin that works may be silent: it gives nothing before a whole unit came."""
        self._settings = settings
        self._torrent = torrent
        self._blocks = blocks
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
        self._streams: dict[int, asyncio.Task[None]] = {}
        self._missing: set[int] = set()
        self._available: frozenset[int] = frozenset()
        self._wake = asyncio.Event()
        self._look_due = float("-inf")
        self._flow = Flow(_now())
        self._taking = Taking(torrent, supply, self._flow, self._missing, settings.stall_timeout_s / 2 + self.lull_s)
        most = MAX_STREAMS if unit_bytes == 1 else MAX_UNIT_STREAMS
        self._max_streams = max(1, min(most, MAX_IN_FLIGHT_BYTES // (2 * torrent.piece_length)))

    @property
    def origin_bytes(self) -> int:
        """Payload that came from origins."""
        return self._taking.origin_bytes

    @property
    def kept_bytes(self) -> int:
        """Of pieces from origins that were not here yet."""
        return self._flow.given_bytes

    @property
    def accompanied(self) -> bool:
        """Whether others fetch it too, or did."""
        return bool(self._wanting.peers)

    @property
    def pending_bytes(self) -> int:
        """Of pieces that came in part."""
        return self._taking.pending_bytes

    @property
    def account(self) -> str:
        """How far it came, for a message."""
        return f"{self._flow.most} of {self._torrent.size} bytes came, then none for {self.idle_s:.0f} s"

    @property
    def idle_s(self) -> float:
        """How long nothing came, from wherever."""
        return _now() - self._flow.moved_at

    def begin(self) -> None:
        """The origin is needed: tell the others that want the shard too."""
        if not self.begun:
            self.begun = True
            self._flow.moved_at = _now()
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
        self._flow.begin(_now())
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
            self._wanting.holds = not self.supply.exhausted
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
        self._flow.saw(now, seen.bytes_done)
        self._need.saw(now, self._flow.peer_bytes, seen.peers)

    def _patience_s(self, download: Download) -> float:
        alone = not download.progress().peers and not self._wanting.lease.others
        if self.supply.exhausted and alone:
            return min(self._settings.find_timeout_s, LAST_LOOK_S)
        return self._settings.stall_timeout_s + self.lull_s

    async def _seek_layer(self, download: Download) -> None:
        """Have the piece layer from an origin, unless peers give it meanwhile. Raises WholeNeededError."""
        layer = await self.supply.piece_layer(_now())
        if layer:
            await download.take_layer(layer)
            return
        if layer is None or await download.available_pieces():
            return
        if not self._wanting.lease.owns(0):
            self._flow.moved_at = _now()  # Another takes it whole, and gives up before long if nothing comes.
            return
        if _now() < self._look_due:
            return
        self._look_due = _now() + self._settings.relookup_s
        download.add_peers(await self._sources.look_up())
        if download.piece_layer or self.supply.exhausted:
            return
        if not self._sources.whole or self.idle_s >= UNSTICK_S:  # a record outlives its node
            raise WholeNeededError

    async def _plan(self, download: Download, streams: asyncio.TaskGroup) -> None:
        self._missing.clear()
        self._missing.update(piece.index for piece in download.missing_pieces())
        self._available = await download.available_pieces()
        busy = {index for block in self._streams for index in self._blocks[block].pieces}
        self._taking.forget_but(self._missing | busy)
        stuck = _now() - self._flow.shared_at >= STUCK_S + self.lull_s
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
        return self.idle_s >= UNSTICK_S + self.lull_s or self._need.slow(_now())

    async def _take(self, number: int, download: Download) -> None:
        """Have the missing pieces of a block, or what of them an origin gives before it fails."""
        try:
            while (place := self.supply.next_place(_now())) and (run := self._next_run(self._blocks[number])):
                try:
                    await self._taking.take(place, run, download, shared=self._wanting.lease.owns(number))
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


def _now() -> float:
    return asyncio.get_running_loop().time()
