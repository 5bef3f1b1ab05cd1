"""One torrent in the session: commands go to libtorrent, answers come back as awaited events."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import libtorrent as lt

from node.swarm.alerts import (
    CacheFlushed,
    Event,
    FileFailed,
    FileRenamed,
    PiecesAvailable,
    Removed,
    ResumeSaved,
    TorrentStatus,
)
from node.swarm.torrent import PeerAddress, Torrent
from protocol.errors import InsufficientDiskError, InternalError, ShoalError, TimedOutError

_log = logging.getLogger(__name__)

E = TypeVar("E")

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Handle:
    """A torrent that the session holds. Lives on the event loop; no call of it waits for libtorrent's threads."""

    def __init__(self, torrent: Torrent, path: Path, listener: Callable[[Event], None]) -> None:
        self.torrent = torrent
        self.path = path
        """Where its file is now."""
        self.listener = listener
        """Called with every event."""
        self._raw: Any = None
        self._waiting: defaultdict[type[Any], list[asyncio.Future[Any]]] = defaultdict(list)

    def attach(self, raw: Any) -> None:
        """The session's part: the torrent is added. Events may have come before."""
        self._raw = raw

    def on_event(self, event: Event) -> None:
        """The session's part: an event of this torrent."""
        if isinstance(event, FileFailed):
            self.fail(file_error(self.path, event.errno, event.message))
        for future in self._waiting.pop(type(event), ()):
            if not future.done():
                future.set_result(event)
        self.listener(event)

    def fail(self, error: ShoalError) -> None:
        """End every wait with `error`, except waits for Removed, which still comes."""
        for kind in [kind for kind in self._waiting if kind is not Removed]:
            for future in self._waiting.pop(kind):
                if not future.done():
                    future.set_exception(error)

    def expect(self, kind: type[E]) -> asyncio.Future[E]:
        """The next event of that kind. Call it before what causes the event."""
        future: asyncio.Future[E] = asyncio.get_running_loop().create_future()
        self._waiting[kind].append(future)
        return future

    async def _answer(self, kind: type[E], command: Callable[[], object], timeout_s: float) -> E:
        future = self.expect(kind)
        try:
            command()
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise TimedOutError(
                f"libtorrent did not answer with {kind.__name__} for {self.torrent.name!r} in {timeout_s:g} s"
            ) from None
        except RuntimeError as err:
            raise InternalError(f"{self.torrent.name!r} is no longer in the session: {err}") from None
        finally:
            future.cancel()

    async def flush(self, timeout_s: float = 60.0) -> None:
        """Return when everything received is in the file."""
        await self._answer(CacheFlushed, self._raw.flush_cache, timeout_s)

    async def rename(self, path: Path) -> None:
        """Move the file to another name in the same folder, replacing what is there; the torrent goes on."""
        answer = await self._answer(FileRenamed, lambda: self._raw.rename_file(0, path.name), 30.0)
        if answer.error:
            raise InternalError(f"cannot rename {self.path.name!r} to {path.name!r}: {answer.error}")
        self.path = path

    async def save(self, *, flush: bool, timeout_s: float = 10.0) -> ResumeSaved:
        """Resume data and, once peers gave all of it, the piece layer. `flush` writes queued bytes first."""
        flags = int(lt.save_resume_flags_t.save_info_dict)
        if flush:
            # libtorrent's own flag for this does not wait: now and then no piece counted as written.
            await self.flush(timeout_s)
        return await self._answer(ResumeSaved, lambda: self._raw.save_resume_data(flags), timeout_s)

    async def resume_data(self, timeout_s: float = 10.0) -> bytes:
        """Resume data, after everything received was written to the file; empty if libtorrent gives none."""
        try:
            return (await self.save(flush=True, timeout_s=timeout_s)).data
        except ShoalError:
            return b""

    async def status(self, timeout_s: float = 30.0) -> TorrentStatus:
        """How far it is, with its pieces."""
        query = int(lt.status_flags_t.query_pieces)
        while True:
            answer = await self._answer(TorrentStatus, lambda: self._raw.post_status(query), timeout_s)
            if answer.pieces is not None:  # the session's regular updates come without
                return answer

    async def availability(self, timeout_s: float = 5.0) -> tuple[int, ...]:
        """How many connected peers have each piece; see `PiecesAvailable`."""
        return (await self._answer(PiecesAvailable, self._raw.post_piece_availability, timeout_s)).peers

    def connect(self, peer: PeerAddress) -> None:
        """Dial a peer; events show the result."""
        try:
            self._raw.connect_peer((peer.host, peer.port))
        except (RuntimeError, OverflowError) as err:
            _log.debug("cannot dial %s:%d for %s: %s", peer.host, peer.port, self.torrent.name, err)

    def serve(self, slots: int) -> None:
        """Send to at most so many peers at once."""
        self._raw.set_max_uploads(slots)

    def hurry(self) -> None:
        """Dial the known peers now instead of at libtorrent's next full second. Call it before any is connected."""
        self._raw.pause()
        self._raw.resume()

    def add_piece(self, index: int, data: bytes) -> None:
        """Give a piece; PieceFinished or HashFailed follows."""
        self._raw.add_piece(index, data, 0)

    @property
    def raw(self) -> Any:
        """libtorrent's handle, for the session alone."""
        return self._raw


def file_error(path: Path, number: int, message: str) -> ShoalError:
    """The error to raise for a failed read or write of the file."""
    if number in NO_SPACE:
        return InsufficientDiskError(
            f"the disk of {path.parent} is full while {path.name!r} is written: free some space, then fetch again",
            {"path": str(path)},
        )
    return InternalError(f"cannot read or write {path.name!r}: {message}", {"path": str(path), "errno": number})


def translated(path: Path, err: Exception) -> ShoalError:
    """The ShoalError for what ended a download; an unexpected exception is logged."""
    if isinstance(err, ShoalError):
        return err
    if isinstance(err, OSError):
        return file_error(path, err.errno or 0, str(err))
    _log.error("the download to %s failed", path, exc_info=err)
    return InternalError(f"the download to {path.name!r} failed: {err!r}")
