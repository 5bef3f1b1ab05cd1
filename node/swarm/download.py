"""A download: from reserved space to a file whose every piece was checked."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from node.swarm.alerts import (
    Event,
    FileFailed,
    Finished,
    HashFailed,
    PeerBanned,
    PieceFinished,
    TorrentStatus,
)
from node.swarm.handle import Handle, file_error
from node.swarm.part_file import PartFile
from node.swarm.torrent import PeerAddress, Piece, Torrent
from node.swarm.watchdog import Verdict, Watchdog
from protocol.errors import CancelledRequestError, InternalError, InvalidParamsError, ShoalError

if TYPE_CHECKING:
    from node.swarm.session import Session

_TICK_S = 0.25
_ADD_PIECE_TIMEOUT_S = 60.0
MAX_PEERS = 1000


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far a download is, at most a second old."""

    bytes_done: int
    bytes_total: int
    rate_bytes_s: int
    """Payload from peers."""
    peers: int
    """Connected now."""


class Download:
    """One file on its way. Made by `Swarm.download`; lives on the event loop."""

    def __init__(self, session: Session, torrent: Torrent, path: Path, part: PartFile, *, stall_s: float) -> None:
        self.torrent = torrent
        self._session = session
        self._path = path
        self._part = part
        self._watchdog = Watchdog(stall_s, time.monotonic())
        self._handle: Handle | None = None
        self._have: set[int] = set()
        self._status: TorrentStatus | None = None
        self._peers: dict[PeerAddress, None] = {}  # in the order in which they became known
        self._layer = b""
        self._offered: defaultdict[int, list[asyncio.Future[bool]]] = defaultdict(list)
        self._wake = asyncio.Event()
        self._finished = False
        self._error: ShoalError | None = None
        self._started = asyncio.Event()
        self._done: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
        self._done.add_done_callback(_retrieved)
        self._owner: asyncio.Task[None] | None = None

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
        for peer in peers:
            if peer not in self._peers and len(self._peers) >= MAX_PEERS:
                return
            self._peers[peer] = None
            if self._handle and not self._watchdog.careful and not self.done:
                self._handle.connect(peer)
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
        await self._ready()
        if self._finished or index in self._have:
            return True
        assert self._handle is not None
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._offered[index].append(answer)
        self._handle.add_piece(index, data)
        try:
            return await answer
        finally:
            if answer in self._offered.get(index, ()):
                self._offered[index].remove(answer)

    async def verified(self) -> Path:
        """The file, under its final name: flushed and every piece checked. It is seeded from now on.

        Raises InsufficientDiskError where the disk is full, CancelledRequestError where the download was
        cancelled or the node stops. A caller that is cancelled leaves the download running.
        """
        return await asyncio.shield(self._done)

    async def cancel(self, delete: bool = False) -> None:
        """Stop. What came is kept for another time, unless `delete`. Does nothing to a finished download."""
        if self._owner and not self._done.done():
            self._owner.cancel()
            await asyncio.wait([self._owner])
        if delete and not self._finished:
            await self._part.forget(delete=True)

    async def _ready(self) -> None:
        """Return when pieces can be taken; raise what ended the download."""
        if not self._started.is_set():
            started = asyncio.ensure_future(self._started.wait())
            try:
                await asyncio.wait([started, self._done], return_when=asyncio.FIRST_COMPLETED)
            finally:
                started.cancel()
        if self._done.done():
            self._done.result()
