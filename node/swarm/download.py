"""A download: from reserved space to a file whose every piece was checked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from node.swarm.alerts import Event, FileFailed, Finished, HashFailed, PeerBanned, PieceFinished, TorrentStatus
from node.swarm.availability import Availability
from node.swarm.handle import Handle, file_error, translated
from node.swarm.offers import Offers
from node.swarm.part_file import PartFile
from node.swarm.piece_layer import PieceLayer
from node.swarm.torrent import DownloadProgress, PeerAddress, Piece, Torrent
from node.swarm.watchdog import Verdict, Watchdog
from protocol.errors import CancelledRequestError, InvalidParamsError, ShoalError

if TYPE_CHECKING:
    from node.swarm.session import Session

_log = logging.getLogger(__name__)

_TICK_S = 0.25
_STOP_TIMEOUT_S = 2.0
MAX_PEERS = 1000


class Download:
    """One file on its way. Made by `Swarm.download`; lives on the event loop."""

    def __init__(
        self, session: Session, torrent: Torrent, path: Path, part: PartFile, *, piece_layer: bytes, stall_s: float
    ) -> None:
        self.torrent = torrent
        self._session = session
        self._path = path
        self._part = part
        self._watchdog = Watchdog(stall_s, time.monotonic())
        self._handle: Handle | None = None
        self._have: set[int] = set()
        self._status: TorrentStatus | None = None
        self._peers: dict[PeerAddress, None] = {}  # in the order in which they became known
        self._layer = PieceLayer(torrent, part, piece_layer)
        self._availability = Availability()
        self._offers = Offers()
        self._wake = asyncio.Event()
        self._complete = self._finished = False
        self._error: ShoalError | None = None
        self._ready = asyncio.Event()
        self._done: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
        self._done.add_done_callback(_retrieved)
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def finished(cls, session: Session, torrent: Torrent, path: Path, part: PartFile) -> Download:
        """The download of a file that is here already."""
        download = cls(session, torrent, path, part, piece_layer=b"", stall_s=1.0)
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
        """Wait until the part file was looked through: from then on `missing_pieces()` is right, or it has ended."""
        await self._ready.wait()

    def missing_pieces(self) -> tuple[Piece, ...]:
        """The pieces that did not pass their check yet, in order."""
        if self._finished:
            return ()
        return tuple(self.torrent.piece(index) for index in range(self.torrent.pieces) if index not in self._have)

    def add_peers(self, peers: Iterable[PeerAddress]) -> None:
        """Tell it whom to ask. Known ones are dialled again; above MAX_PEERS the rest is left out."""
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
        """32 bytes a piece; empty while it is not known, and where there is none: a file of one piece."""
        return self._layer.known

    async def take_layer(self, layer: bytes) -> None:
        """Give it the piece layer, had from elsewhere after the download began; needless where it is known.

        Raises InvalidShardError where it is not that of the content id.
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
        """Give a piece that was fetched elsewhere. True: it passed its check and is kept, or was here already.

        Raises InvalidParamsError for a piece that the file has not, or of a wrong size. While nobody has given the
        piece layer, a piece cannot be checked alone: the call returns when all are here.
        """
        if not 0 <= index < self.torrent.pieces or len(data) != self.torrent.piece(index).size:
            raise InvalidParamsError(f"{self.torrent.name!r} has no piece {index} of {len(data)} bytes")
        await self._ready.wait()
        if self._done.done():
            self._done.result()
        if self._finished or index in self._have:
            return True
        assert self._handle is not None
        return await self._offers.give(self._handle, index, data)

    async def verified(self) -> Path:
        """The file, under its final name: flushed and every piece checked. It is seeded from now on.

        Raises InsufficientDiskError where the disk is full, CancelledRequestError where the download was
        cancelled or the node stops. A caller that is cancelled leaves the download running.
        """
        return await asyncio.shield(self._done)

    async def cancel(self, delete: bool = False) -> None:
        """Stop. What came is kept for another time, unless `delete`. Does nothing to a finished download."""
        if self._task and not self._done.done():
            self._task.cancel()
            await asyncio.wait([self._task])
        if delete and not self._finished:
            await self._part.forget(delete=True)

    # What the swarm does with it.

    async def run(self) -> Handle | None:
        """Carry the download to its end; the handle of the torrent, which seeds from then on, or None."""
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
            fresh = True  # what a crash left cannot be checked without its piece layer
        self._handle = await self._add(resume, have=() if fresh else None)
        await self._layer.keep()
        self.add_peers(tuple(self._peers))
        if self._peers:
            self._handle.hurry()
        while not self._complete:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._wake.wait()
            if self._error:
                raise self._error
            if self._layer.is_new_to_session:
                await self._restart(self._handle)
            elif self._have:
                await self._layer.learn(self._handle, time.monotonic())
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
        self._status = status = await handle.status()
        self._have = {index for index, has in enumerate(status.pieces or ()) if has}
        self._handle = handle
        self._ready.set()
        return handle

    async def _watch(self, handle: Handle) -> None:
        now = time.monotonic()
        if self._status:
            self._watchdog.progressed(now, self._status.bytes_done)
        verdict = self._watchdog.verdict(now, self._peers)
        if verdict is Verdict.RESTART:
            await self._restart(handle)
        elif verdict is Verdict.CONNECT_NEXT:
            self._connect_next()

    async def _restart(self, handle: Handle) -> None:
        """Take the torrent out and put it back: after a stall, or to give the session a piece layer."""
        _log.info("%s: begun anew, %d peers known", self.torrent.name, len(self._peers))
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
        self._offers.answer_all(kept=False)
        self._watchdog.restarted(time.monotonic())
        await self._add(resume, have=have)
        if self._watchdog.careful:
            self._connect_next()
        else:
            self.add_peers(tuple(self._peers))

    def _connect_next(self) -> None:
        peer = self._watchdog.next_peer(time.monotonic(), self._peers)
        if peer and self._handle:
            self._handle.connect(peer)
            if self._watchdog.alone:
                self._handle.hurry()

    async def _leave(self, *, clean: bool) -> None:
        """Take the torrent out; after a clean stop what came is taken up again without a check."""
        self._ready.clear()  # `run` sets it: who gives a piece meanwhile gets the download's own error
        handle, self._handle = self._handle, None
        if handle:
            resume = await handle.resume_data(_STOP_TIMEOUT_S) if clean else b""
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


def _retrieved(future: asyncio.Future[Path]) -> None:
    # A download that nobody waits for may fail without a warning from asyncio.
    if not future.cancelled():
        future.exception()
