"""A download: from reserved space to a file whose every piece was checked, from peers and from callers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

from node.clock import Clock
from node.swarm.alerts import Event, FileFailed, Finished, HashFailed, PeerBanned, PieceFinished, TorrentStatus
from node.swarm.handle import Handle, file_error, translated
from node.swarm.part_file import PartFile
from node.swarm.piece_layer import PieceLayer
from node.swarm.session import TorrentSession
from node.swarm.settings import SwarmSettings
from node.swarm.torrent import DownloadProgress, PeerAddress, Piece, Torrent
from node.swarm.watchdog import Verdict, Watchdog
from protocol.errors import CancelledRequestError, InvalidParamsError, ShoalError

_log = logging.getLogger(__name__)

_TICK_S = 0.25
MAX_PEERS = 1000


class Download:
    """One file on its way. Made by `Swarm.download`; lives on the event loop."""

    def __init__(
        self,
        session: TorrentSession,
        torrent: Torrent,
        path: Path,
        part: PartFile,
        settings: SwarmSettings,
        clock: Clock,
        piece_layer: bytes = b"",
    ) -> None:
        self.torrent = torrent
        self._session = session
        self._path = path
        self._part = part
        self._settings = settings
        self._clock = clock
        self._watchdog = Watchdog(settings.stall_s, clock.now())
        self._handle: Handle | None = None
        """To use; None while the torrent is added or restarted."""
        self._in_session: Handle | None = None
        """To take out at the end, at whatever step that comes."""
        self._have: set[int] = set()
        self._status: TorrentStatus | None = None
        self._peers: dict[PeerAddress, None] = {}  # in the order in which they became known
        self._layer = PieceLayer(torrent, part, piece_layer, settings.ask_every_s)
        self._availability = _Availability(clock, settings.ask_every_s)
        self._offers = _Offers()
        self._wake = asyncio.Event()
        self._complete = self._finished = False
        self._error: ShoalError | None = None
        self._ready = asyncio.Event()
        self._done: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
        self._done.add_done_callback(_retrieved)
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def finished(
        cls,
        session: TorrentSession,
        torrent: Torrent,
        path: Path,
        part: PartFile,
        settings: SwarmSettings,
        clock: Clock,
    ) -> Download:
        """The download of a file that is complete already."""
        download = cls(session, torrent, path, part, settings, clock)
        download._complete = download._finished = True
        download._ready.set()
        download._done.set_result(path)
        return download

    @property
    def done(self) -> bool:
        """Whether it ended, well or not."""
        return self._done.done()

    def progress(self) -> DownloadProgress:
        """How far it is."""
        size, now = self.torrent.size, self._status
        done, rate, peers = (now.bytes_done, now.download_rate_bytes_s, now.peers) if now else (0, 0, 0)
        if self._finished:
            return DownloadProgress(size, size, 0, peers)
        checked = sum(self.torrent.piece(index).size for index in self._have)
        return DownloadProgress(min(max(checked, done), size), size, rate, peers)

    async def ready(self) -> None:
        """Wait until the part file was checked: from then on `missing_pieces()` is right, or the download has ended."""
        await self._ready.wait()

    def missing_pieces(self) -> tuple[Piece, ...]:
        """The pieces that have not passed their check yet, in order."""
        if self._finished:
            return ()
        return tuple(self.torrent.piece(index) for index in range(self.torrent.pieces) if index not in self._have)

    def add_peers(self, peers: Iterable[PeerAddress]) -> None:
        """Add peers to ask. Known ones are dialed again; above MAX_PEERS the rest is left out."""
        first = not self._peers
        for peer in peers:
            if peer not in self._peers and len(self._peers) >= MAX_PEERS:
                return
            self._peers[peer] = None
            if self._handle and not self._watchdog.careful:
                self._handle.connect(peer)
        if first and self._peers and self._handle:
            self._handle.hurry()
        self._wake.set()

    @property
    def piece_layer(self) -> bytes:
        """32 bytes a piece; empty while it is not known, and for a file of one piece, which has none."""
        return self._layer.known

    async def take_layer(self, layer: bytes) -> None:
        """Give it the piece layer after the download began; does nothing if it is known.

        Raises InvalidShardError if it does not fit the content id.
        """
        await self._ready.wait()
        if not self._done.done() and self._layer.take(layer):
            self._ready.clear()
            self._wake.set()
            await self._ready.wait()

    async def available_pieces(self) -> frozenset[int]:
        """The pieces that some connected peer has; as of at most a second ago."""
        return await self._availability.pieces(self._handle)

    async def add_piece(self, index: int, data: bytes) -> bool:
        """Give a piece that was fetched elsewhere. True if it passed its check and is kept, or was here already.

        Raises InvalidParamsError for an index that the file does not have, or a wrong size. While the piece layer
        is not known, a piece cannot be checked alone: the call returns when all are here.
        """
        if not 0 <= index < self.torrent.pieces or len(data) != self.torrent.piece(index).size:
            raise InvalidParamsError(
                f"{self.torrent.name!r} has {self.torrent.pieces} pieces of {self.torrent.piece_length} bytes, "
                f"the last one shorter; piece {index} with {len(data)} bytes is not one of them"
            )
        await self._ready.wait()
        if self._done.done():
            self._done.result()
        if self._finished or index in self._have:
            return True
        assert self._handle is not None
        return await self._offers.give(self._handle, index, data)

    async def verified(self) -> Path:
        """The file, under its final name: flushed and every piece checked. It is seeded from then on.

        Raises InsufficientDiskError if the disk is full, CancelledRequestError if the download is cancelled or the
        node stops. A caller that is cancelled leaves the download running.
        """
        return await asyncio.shield(self._done)

    async def cancel(self, delete: bool = False) -> None:
        """Stop. What was received is kept for the next time, unless `delete`. Does nothing to a finished download."""
        if self._task and not self._done.done():
            self._task.cancel()
            await asyncio.wait([self._task])
        if delete and not self._finished:
            await self._part.forget(delete=True)

    # ---- for the swarm

    async def run(self) -> Handle | None:
        """Run the download to its end. Returns the torrent's handle, which seeds from then on; None if it failed."""
        self._task = asyncio.current_task()
        try:
            handle = await self._fetch()
        except asyncio.CancelledError:
            await self._leave(clean=True)
            self._done.set_exception(CancelledRequestError(f"the download of {self.torrent.name!r} was stopped"))
            raise
        except Exception as err:
            await self._leave(clean=False)
            self._done.set_exception(translated(self._part.path, err))
            return None
        else:
            self._finished = True
            self._done.set_result(self._path)
            return handle
        finally:
            self._offers.answer_all(kept=self._finished)
            self._ready.set()

    async def _fetch(self) -> Handle:
        resume, layer = await self._part.load()
        fresh = await self._part.reserve()
        self._layer.known = self._layer.known or layer
        if not resume and self._layer.missing:
            fresh = True  # without its piece layer, what a crash left cannot be checked
        self._handle = await self._add(resume, have=() if fresh else None)
        await self._layer.keep()
        self.add_peers(tuple(self._peers))
        if self._peers:
            self._handle.hurry()
        while not self._complete:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout(_TICK_S):
                    await self._wake.wait()
            if self._error:
                raise self._error
            if self._layer.is_new_to_session:
                await self._restart(self._handle)
            elif self._have:
                await self._layer.learn(self._handle, self._clock.now())
            if not self._complete:
                await self._watch(self._handle)
        await self._handle.flush()
        await self._handle.rename(self._path)
        await self._part.forget(delete=False)
        return self._handle

    async def _add(self, resume: bytes, *, have: Collection[int] | None) -> Handle:
        handle = await self._session.add(
            self.torrent,
            self._part.path,
            self._on_event,
            piece_layer=self._layer.known,
            resume=resume,
            have=have,
            exchange_peers=not self._watchdog.careful,
        )
        self._in_session = handle
        self._status = status = await handle.status()
        self._have = {index for index, has in enumerate(status.pieces or ()) if has}
        self._handle = handle
        self._ready.set()
        return handle

    async def _watch(self, handle: Handle) -> None:
        now = self._clock.now()
        if self._status:
            self._watchdog.progressed(now, self._status.bytes_done)
        verdict = self._watchdog.verdict(now, self._peers)
        if verdict is Verdict.RESTART:
            await self._restart(handle)
        elif verdict is Verdict.CONNECT_NEXT:
            self._connect_next()

    async def _restart(self, handle: Handle) -> None:
        """Take the torrent out and put it back: after a stall, or to give the session a piece layer."""
        _log.info("%s: restarted, %d peers known", self.torrent.name, len(self._peers))
        self._ready.clear()
        self._handle = None
        resume, have = b"", None
        if self._layer.is_new_to_session:  # resume data would go on without it
            await self._layer.keep()
            have = frozenset(self._have)  # before the flush: what comes after it may not be on the disk
            await handle.flush()
        else:
            resume = await handle.resume_data()
        self._layer.is_new_to_session = False
        await self._session.remove(handle)
        self._in_session = None
        self._offers.answer_all(kept=False)
        self._watchdog.restarted(self._clock.now())
        await self._add(resume, have=have)
        if self._watchdog.careful:
            self._connect_next()
        else:
            self.add_peers(tuple(self._peers))

    def _connect_next(self) -> None:
        peer = self._watchdog.next_peer(self._clock.now(), self._peers)
        if peer and self._handle:
            self._handle.connect(peer)
            if self._watchdog.alone:
                self._handle.hurry()

    async def _leave(self, *, clean: bool) -> None:
        """Take the torrent out. After a clean stop, what was received is continued without a check."""
        self._ready.clear()  # `run` sets it: a caller that gives a piece meanwhile gets the download's own error
        self._handle = None
        if handle := self._in_session:
            self._in_session = None
            resume = await handle.resume_data(self._settings.stop_timeout_s) if clean else b""
            await self._session.remove(handle)
            with contextlib.suppress(OSError):
                await self._part.keep_resume(resume)

    def _on_event(self, event: Event) -> None:
        match event:
            case TorrentStatus():
                self._status = event
            case PieceFinished():
                self._have.add(event.piece)
                self._offers.answer(event.piece, kept=True)
                if not self._layer.asked:  # the first piece: the piece layer is about to be whole
                    self._wake.set()
            case HashFailed():
                if event.piece not in self._offers:
                    self._watchdog.piece_failed()
                self._offers.answer(event.piece, kept=False)
            case PeerBanned():
                self._watchdog.piece_failed()
            case FileFailed():
                self._error = file_error(self._part.path, event.errno, event.message)
                self._wake.set()
            case Finished():
                self._complete = True
                self._wake.set()


class _Availability:
    """Which pieces connected peers have, asked for at most every `ask_every_s`."""

    def __init__(self, clock: Clock, ask_every_s: float) -> None:
        self._clock = clock
        self._ask_every_s = ask_every_s
        self._pieces: frozenset[int] = frozenset()
        self._due = 0.0

    async def pieces(self, handle: Handle | None) -> frozenset[int]:
        """The pieces that some connected peer has."""
        now = self._clock.now()
        if handle and (now >= self._due or not self._pieces):  # a first peer that has some is not missed
            self._due = now + self._ask_every_s
            with contextlib.suppress(ShoalError):  # the torrent is being restarted, or has just ended
                counts = await handle.availability()
                self._pieces = frozenset(index for index, peers in enumerate(counts) if peers)
        return self._pieces


class _Offers:
    """Pieces that were given by callers, and the callers that wait for their check."""

    def __init__(self) -> None:
        self._waiting: defaultdict[int, list[asyncio.Future[bool]]] = defaultdict(list)

    def __contains__(self, index: int) -> bool:
        return index in self._waiting

    async def give(self, handle: Handle, index: int, data: bytes) -> bool:
        """Give a piece to the session. Returns whether it was kept."""
        answer = self.wait(index)
        try:
            handle.add_piece(index, data)
            return await answer
        finally:
            self.forget(index, answer)

    def wait(self, index: int) -> asyncio.Future[bool]:
        """A future that tells whether the piece was kept."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[index].append(future)
        return future

    def forget(self, index: int, future: asyncio.Future[bool]) -> None:
        """The caller gave up, or has the answer."""
        waiting = self._waiting.get(index, [])
        if future in waiting:
            waiting.remove(future)
        if not waiting:
            self._waiting.pop(index, None)

    def answer(self, index: int, *, kept: bool) -> None:
        """A piece was checked."""
        for future in self._waiting.pop(index, ()):
            if not future.done():
                future.set_result(kept)

    def answer_all(self, *, kept: bool) -> None:
        """Answer every caller: no further check will come."""
        for index in tuple(self._waiting):
            self.answer(index, kept=kept)


def _retrieved(future: asyncio.Future[Path]) -> None:
    # A download that no caller waits for may fail without a warning from asyncio.
    if not future.cancelled():
        future.exception()
