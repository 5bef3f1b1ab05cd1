"""The libtorrent session: opened, asked, and closed here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

import libtorrent as lt

from node.background import to_the_end
from node.swarm.alerts import AlertPump, Checked, Event, Removed, SessionCounters
from node.swarm.handle import Handle
from node.swarm.settings import SwarmSettings, session_params
from node.swarm.torrent import Torrent
from protocol.errors import BusyError, InternalError, InvalidShardError, UnreachableError
from protocol.ids import InfoHash

_CHECK_TIMEOUT_S = 3600.0


class TorrentSession:
    """Torrents by info hash, and the session's counters."""

    def __init__(self, raw: Any, port: int) -> None:
        self.port = port
        self.counters = SessionCounters(0, 0, 0)
        self._raw = raw
        self._handles: dict[InfoHash, Handle] = {}
        self._gone = asyncio.Event()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, settings: SwarmSettings) -> AsyncIterator[TorrentSession]:
        """Open a session. Raises UnreachableError if it cannot listen on the address."""
        # One reference in one place: dropping it ends libtorrent's threads, which takes a moment and a thread of ours.
        # A worker thread keeps what its call was made of and returned for a moment longer than the call: so not that.
        held: list[Any] = []
        await asyncio.to_thread(lambda: held.append(lt.session(session_params(settings))))
        with contextlib.ExitStack() as last:
            try:
                port = await asyncio.to_thread(lambda: int(held[0].listen_port()))
                if not port or (settings.port and port != settings.port):
                    raise UnreachableError(
                        f"cannot listen for BitTorrent on {settings.listen_host}:{settings.port}: is the port taken?"
                    )
                session = cls(held[0], port)
                pump = AlertPump(held[0], session._on_event)
                last.callback(pump.close)
                try:
                    yield session
                finally:
                    session._raw = None
                    pump.detach()
            finally:
                await to_the_end(held.clear)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, SessionCounters):
            self.counters = event
        elif handle := self._handles.get(event.info_hash):
            handle.on_event(event)

    async def add(
        self,
        torrent: Torrent,
        path: Path,
        listener: Callable[[Event], None],
        *,
        piece_layer: bytes = b"",
        resume: bytes = b"",
        have: Collection[int] | None = None,
        seed: bool = False,
        slots: int = -1,
        exchange_peers: bool = True,
    ) -> Handle:
        """Add a torrent whose file is `path`, and return when that file, if it is there, was checked.

        With `seed` the file is taken to be whole, and each piece checked at its first upload. Nothing is checked
        with `resume`, nor with `have`, which says which pieces the file holds. At most `slots` peers are sent
        to at once. Raises InvalidShardError if the piece layer does not fit the content id.
        """
        if torrent.info_hash in self._handles:
            raise BusyError(f"{torrent.name!r} is already in the swarm")
        params = _params(torrent, path, piece_layer, resume)
        if have is not None:
            params.have_pieces = [index in have for index in range(torrent.pieces)]
        flags = int(params.flags) & ~int(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
        flags &= ~int(lt.torrent_flags.seed_mode | lt.torrent_flags.disable_pex)
        flags |= int(lt.torrent_flags.disable_dht | lt.torrent_flags.disable_lsd | lt.torrent_flags.duplicate_is_error)
        if seed:
            flags |= int(lt.torrent_flags.seed_mode)
        if not exchange_peers:
            flags |= int(lt.torrent_flags.disable_pex)
        params.flags = flags
        params.max_uploads = slots
        handle = Handle(torrent, path, listener)
        self._handles[torrent.info_hash] = handle
        checked = handle.expect(Checked)
        try:
            await to_the_end(self._add_now, handle, params)
            async with asyncio.timeout(_CHECK_TIMEOUT_S):
                await checked
        except BaseException as err:
            checked.cancel()
            if handle.raw is None:
                self._handles.pop(torrent.info_hash, None)
            else:
                await asyncio.shield(self.remove(handle))
            if isinstance(err, RuntimeError):
                raise InternalError(f"libtorrent refused {torrent.name!r}: {err}") from None
            raise
        return handle

    def _add_now(self, handle: Handle, params: Any) -> None:
        handle.attach(self._raw.add_torrent(params))

    async def remove(self, handle: Handle) -> None:
        """Take a torrent out of the session; its file stays. Returns when libtorrent has removed it."""
        if self._handles.get(handle.torrent.info_hash) is not handle:
            return
        removed = handle.expect(Removed)
        try:
            self._raw.remove_torrent(handle.raw)
            async with asyncio.timeout(10.0):
                await removed
        except (RuntimeError, TimeoutError):
            pass  # gone already
        finally:
            self._handles.pop(handle.torrent.info_hash, None)
            handle.fail(InternalError(f"{handle.torrent.name!r} was taken out of the swarm"))

    def refresh(self) -> None:
        """Ask for the counters and for the status of every torrent that changed; both come as events."""
        self._raw.post_session_stats()
        self._raw.post_torrent_updates(0)


def _params(torrent: Torrent, path: Path, piece_layer: bytes, resume: bytes) -> Any:
    try:
        if resume:
            params = lt.read_resume_data(resume)
            # Only what is on disk is continued; the peers and bans of the last run are not.
            params.peers = []
            params.banned_peers = []
        else:
            params = lt.load_torrent_buffer(torrent.metainfo(piece_layer))
        found = str(params.ti.info_hashes().v2) if params.ti else "none"
    except RuntimeError as err:
        raise InvalidShardError(
            f"the piece layer of {torrent.name!r} does not belong to content id {torrent.content_id}: {err}"
        ) from None
    if found != torrent.info_hash:
        raise InvalidShardError(f"{torrent.name!r} gives info hash {found}, expected {torrent.info_hash}")
    params.save_path = str(path.parent)
    params.renamed_files = {0: path.name}
    return params
