"""The swarm: every torrent that this node seeds or downloads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from node.background import FirstErrorGroup
from node.clock import Clock
from node.swarm.alerts import Event, FileFailed, StateChanged, TorrentStatus
from node.swarm.download import Download
from node.swarm.handle import Handle
from node.swarm.part_file import PartFile
from node.swarm.session import TorrentSession
from node.swarm.settings import SwarmSettings
from node.swarm.torrent import Torrent
from protocol.errors import InvalidShardError
from protocol.ids import InfoHash

_log = logging.getLogger(__name__)

_SEED_SLOTS = 1
MAX_SLOTS = 32
MIN_SLOTS = 2
"""libtorrent takes 1 when a torrent is added, and no less than 2 later."""
FILLED = 0.7
"""Share of the limit that counts as filled: a seed at its limit sends in bursts."""
UNLIMITED_BYTES_S = 50_000_000
"""The rate that counts as filled for a seed without a limit: about half of a gigabit network."""
PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class SwarmStats:
    """Totals since the swarm was opened, at most a second old."""

    uploaded_bytes: int
    """Payload sent to peers."""
    downloaded_bytes: int
    """Payload received from peers, with what was thrown away."""
    peers: int
    """Connections now, over all torrents."""
    torrents: int
    """Seeding and downloading."""


class Swarm:
    """Seeds and downloads of one node. Opened by `async with Swarm.open(settings)`."""

    def __init__(
        self, settings: SwarmSettings, session: TorrentSession, tasks: asyncio.TaskGroup, clock: Clock
    ) -> None:
        self._settings = settings
        self._session = session
        self._tasks = tasks
        self._clock = clock
        self._seeds: dict[InfoHash, Handle] = {}
        self._downloads: dict[InfoHash, Download] = {}
        self._slots: dict[InfoHash, UploadSlots] = {}
        self._leaving: dict[InfoHash, asyncio.Task[None]] = {}
        """Seeds found wrong, while they are removed: until then the session takes no other of this info hash."""
        self._invalid_listeners: list[Callable[[Torrent, str], None]] = []
        self._seeding = asyncio.Lock()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: SwarmSettings, clock: Clock | None = None) -> AsyncIterator[Swarm]:
        """Listen and serve until the context ends; unfinished downloads are kept for the next time.

        Raises UnreachableError if it cannot listen on the address.
        """
        await asyncio.to_thread(settings.state_dir.mkdir, parents=True, exist_ok=True)
        async with TorrentSession.open(settings) as session, FirstErrorGroup() as tasks:
            swarm = cls(settings, session, tasks, clock or Clock())
            refreshing = tasks.create_task(swarm._refresh())
            try:
                yield swarm
            finally:
                refreshing.cancel()
                await asyncio.gather(*(download.cancel() for download in swarm._downloads.values()))

    @property
    def port(self) -> int:
        """The TCP port that peers connect to."""
        return self._session.port

    def stats(self) -> SwarmStats:
        """Totals of the session."""
        counters = self._session.counters
        return SwarmStats(
            counters.uploaded_bytes,
            counters.downloaded_bytes,
            counters.peers,
            len(self._seeds) + len(self._downloads),
        )

    async def seed(self, torrent: Torrent, path: Path, piece_layer: bytes) -> None:
        """Serve a file that was hashed before; each piece is read and checked again when a peer first asks for it.

        Raises InvalidShardError if the file is missing or has another size, or if the piece layer does not fit the
        content id. A torrent that is seeded already goes on as it is.
        """
        async with self._seeding:
            await self._removed(torrent.info_hash)
            if torrent.info_hash in self._seeds:
                return
            size = await asyncio.to_thread(_size, path)
            if size != torrent.size:
                found = "is missing" if size is None else f"has {size} bytes"
                raise InvalidShardError(f"{path.name!r} should have {torrent.size} bytes but {found}: hash it again")
            handle = await self._session.add(
                torrent,
                path,
                lambda event: self._on_seed_event(torrent, event),
                piece_layer=piece_layer,
                seed=True,
                slots=_SEED_SLOTS,
            )
            self._begin_seeding(handle, _SEED_SLOTS)

    async def download(self, torrent: Torrent, path: Path, piece_layer: bytes = b"") -> Download:
        """Begin, or go on, to fetch a file to `path`; until it is complete it is named `path` with `.part` added.

        Without `piece_layer` it comes from peers. Two calls for one info hash return the same download.
        """
        await self._removed(torrent.info_hash)
        if download := self._downloads.get(torrent.info_hash):
            return download
        part = PartFile(torrent, path, self._settings.state_dir)
        if handle := self._seeds.get(torrent.info_hash):
            return Download.finished(self._session, torrent, handle.path, part, self._settings, self._clock)
        download = Download(self._session, torrent, path, part, self._settings, self._clock, piece_layer)
        self._downloads[torrent.info_hash] = download
        self._tasks.create_task(self._run(download), name=f"download {torrent.name}")
        await asyncio.sleep(0)  # it begins: a task that is cancelled before would never tell
        return download

    async def remove(self, info_hash: InfoHash) -> None:
        """Stop seeding or downloading a torrent; its file stays. Does nothing if there is none."""
        if download := self._downloads.get(info_hash):
            await download.cancel()
        self._slots.pop(info_hash, None)
        if handle := self._seeds.pop(info_hash, None):
            await self._session.remove(handle)
        await self._removed(info_hash)

    async def _removed(self, info_hash: InfoHash) -> None:
        if leaving := self._leaving.get(info_hash):
            await asyncio.wait([leaving])

    async def _run(self, download: Download) -> None:
        torrent = download.torrent
        try:
            handle = await download.run()
            if handle:
                handle.listener = lambda event: self._on_seed_event(torrent, event)
                handle.serve(MIN_SLOTS)
                self._begin_seeding(handle, MIN_SLOTS)
        finally:
            del self._downloads[torrent.info_hash]

    def _begin_seeding(self, handle: Handle, slots: int) -> None:
        self._seeds[handle.torrent.info_hash] = handle
        self._slots[handle.torrent.info_hash] = UploadSlots(self._settings.upload_limit_bytes_s, slots)

    @contextlib.contextmanager
    def on_invalid(self, listener: Callable[[Torrent, str], None]) -> Iterator[None]:
        """For the length of the block, call `listener` with each torrent whose file was found changed or unreadable,
        and why. It is not seeded any more.
        """
        self._invalid_listeners.append(listener)
        try:
            yield
        finally:
            self._invalid_listeners.remove(listener)

    def _on_seed_event(self, torrent: Torrent, event: Event) -> None:
        match event:
            case TorrentStatus():
                self._serve(event)
                return
            case FileFailed():
                reason = event.message
            case StateChanged(state="checking_files" | "downloading"):
                reason = "a piece on disk is not what was hashed"
            case _:
                return
        handle = self._seeds.pop(torrent.info_hash, None)
        self._slots.pop(torrent.info_hash, None)
        if handle is None:
            return
        _log.warning("%s is not seeded any more: %s", torrent.name, reason)
        self._leaving[torrent.info_hash] = leaving = self._tasks.create_task(self._session.remove(handle))
        leaving.add_done_callback(lambda _: self._leaving.pop(torrent.info_hash))
        for listener in list(self._invalid_listeners):
            listener(torrent, reason)

    def _serve(self, status: TorrentStatus) -> None:
        handle, slots = self._seeds.get(status.info_hash), self._slots.get(status.info_hash)
        uploaded = self._session.counters.uploaded_bytes
        if handle and slots and slots.observe(self._clock.now(), uploaded, status.served):
            handle.serve(slots.slots)

    async def _refresh(self) -> None:
        while True:
            self._session.refresh()
            await self._clock.sleep(self._settings.refresh_s)


class UploadSlots:
    """How many peers a seed sends one file to at once: as few as fill its upload.

    Measured, 128 MiB to eight nodes from a seed limited to 8 MB/s: with one slot it sends 1.04 to 1.11 times the file
    and the last node is done in 1.03 to 1.11 times the time of one; with two slots 1.3 and 1.3, with four 1.5 and 1.5.
    But a slow peer may keep the only slot and leave the seed nearly idle: then more are opened.

    Pure: time is an argument, in seconds of any steady clock.
    """

    def __init__(self, limit_bytes_s: int, slots: int) -> None:
        self.slots = slots
        self._content_bytes_s = limit_bytes_s * FILLED if limit_bytes_s else UNLIMITED_BYTES_S
        self._last: tuple[float, int] | None = None
        self._idle_periods = 0

    def observe(self, now: float, uploaded_bytes: int, served: int) -> bool:
        """Whether `slots` changed. `uploaded_bytes` is the session's total, `served` how many slots are taken."""
        if self._last is None or now - self._last[0] > 4 * PERIOD_S:
            self._last = (now, uploaded_bytes)
            return False
        passed_s = now - self._last[0]
        if passed_s < PERIOD_S:
            return False
        rate = (uploaded_bytes - self._last[1]) / passed_s
        self._last = (now, uploaded_bytes)
        before = self.slots
        if rate >= self._content_bytes_s:
            self._idle_periods = 0
            self.slots = max(min(self.slots, MIN_SLOTS), self.slots - 1)
        elif served >= self.slots:
            # In the first period transfers begin: it does not show a slow peer.
            self._idle_periods += 1
            if self._idle_periods > 1:
                self.slots = min(MAX_SLOTS, self.slots + 1)
        else:
            self._idle_periods = 0
        return self.slots != before


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
