"""A download: from reserved space to a file whose every piece was checked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from node.swarm.alerts import Event, FileFailed, Finished, HashFailed, PeerBanned, PieceFinished, TorrentStatus
from node.swarm.handle import Handle, file_error, translated
from node.swarm.offers import Offers
from node.swarm.part_file import PartFile, fits
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
        self._layer = piece_layer
        self._layer_due = 0.0
        self._offers = Offers()
        self._wake = asyncio.Event()
        self._complete = False
        self._finished = False
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
        if self._finished:
            return DownloadProgress(self.torrent.size, self.torrent.size, 0, self._status.peers if self._status else 0)
        checked = sum(self.torrent.piece(index).size for index in self._have)
        status = self._status
        if status is None:
            return DownloadProgress(checked, self.torrent.size, 0, 0)
        done = min(max(checked, status.bytes_done), self.torrent.size)
        return DownloadProgress(done, self.torrent.size, status.download_rate_bytes_s, status.peers)

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

    async def add_piece(self, index: int, data: bytes) -> bool:
        """Give a piece that was fetched elsewhere. True: it passed its check and is kept, or was here already.

        Raises InvalidParamsError for a piece that the file has not, or of a wrong size. While no peer has given
        the piece layer, and none was given to `Swarm.download`, a piece cannot be checked alone: the call returns
        when all are here, and should not be waited for one by one.
        """
        try:
            expected = self.torrent.piece(index)
        except IndexError as err:
            raise InvalidParamsError(str(err)) from None
        if len(data) != expected.size:
            raise InvalidParamsError(f"piece {index} has {expected.size} bytes, was given {len(data)}")
        await self._ready.wait()
        if self._done.done():
            self._done.result()
        if self._finished or index in self._have:
            return True
        assert self._handle is not None
        answer = self._offers.wait(index)
        try:
            self._handle.add_piece(index, data)
            return await answer
        finally:
            self._offers.forget(index, answer)

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
        self._layer = self._layer or layer
        if not resume and not self._layer and self.torrent.pieces > 1:
            fresh = True  # what a crash left cannot be checked without its piece layer
        self._handle = await self._add(resume, fresh=fresh)
        if self._layer:
            await self._part.keep_layer(self._layer)
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
            await self._keep_layer()
            if not self._complete:
                await self._watch(self._handle)
        await self._handle.flush()
        await self._handle.rename(self._path)
        await self._part.forget(delete=False)
        return self._handle

    async def _add(self, resume: bytes, *, fresh: bool) -> Handle:
        handle = await self._session.add(
            self.torrent,
            self._part.path,
            self._on_event,
            piece_layer=self._layer,
            resume=resume,
            fresh=fresh,
            exchange_peers=not self._watchdog.careful,
        )
        status = await handle.status()
        self._have = {index for index, has in enumerate(status.pieces or ()) if has}
        self._status = status
        self._handle = handle
        self._ready.set()
        return handle

    async def _keep_layer(self) -> None:
        """Keep the piece layer as soon as peers have given all of it: a crash from then on costs little."""
        now = time.monotonic()
        if self._layer or not self._have or self.torrent.pieces == 1 or now < self._layer_due or not self._handle:
            return
        self._layer_due = now + 4 * _TICK_S
        layer = (await self._handle.save(flush=False)).piece_layer
        if fits(self.torrent, layer):
            self._layer = layer
            await self._part.keep_layer(layer)

    async def _watch(self, handle: Handle) -> None:
        now = time.monotonic()
        if self._status:
            self._watchdog.progressed(now, self._status.bytes_done)
        match self._watchdog.verdict(now, self._peers):
            case Verdict.RESTART:
                await self._restart(handle)
            case Verdict.CONNECT_NEXT:
                self._connect_next()

    async def _restart(self, handle: Handle) -> None:
        _log.info("%s: begun anew after a stall, %d peers known", self.torrent.name, len(self._peers))
        self._ready.clear()
        self._handle = None
        resume = b""
        with contextlib.suppress(ShoalError):
            resume = (await handle.save(flush=True)).data
        await self._session.remove(handle)
        self._offers.answer_all(kept=False)
        self._watchdog.restarted(time.monotonic())
        await self._add(resume, fresh=False)
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
        handle, self._handle = self._handle, None
        if handle is None:
            return
        saved = None
        if clean:
            with contextlib.suppress(ShoalError):
                saved = await handle.save(flush=True, timeout_s=_STOP_TIMEOUT_S)
        await self._session.remove(handle)
        if saved and saved.data:
            with contextlib.suppress(OSError):
                await self._part.keep_resume(saved.data)

    def _on_event(self, event: Event) -> None:
        match event:
            case TorrentStatus():
                self._status = event
            case PieceFinished():
                self._have.add(event.piece)
                self._offers.answer(event.piece, kept=True)
                if not self._layer_due:  # the first piece: the piece layer is about to be whole
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
