"""libtorrent's alerts by file descriptor, each turned into a frozen event when it is read.

An alert is dead at the next `pop_alerts()`, so nothing of it is kept but copied fields.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import libtorrent as lt

from node.swarm.torrent import PeerAddress
from protocol.ids import InfoHash


@dataclass(frozen=True, slots=True)
class Checked:
    """A torrent was added and its file on disk, if any, was checked."""

    info_hash: InfoHash


@dataclass(frozen=True, slots=True)
class StateChanged:
    """A torrent is in another state, by libtorrent's name: checking_files, downloading, finished, seeding, ..."""

    info_hash: InfoHash
    state: str


@dataclass(frozen=True, slots=True)
class PieceFinished:
    """A piece passed its hash check."""

    info_hash: InfoHash
    piece: int


@dataclass(frozen=True, slots=True)
class HashFailed:
    """A piece did not pass its hash check and was thrown away."""

    info_hash: InfoHash
    piece: int


@dataclass(frozen=True, slots=True)
class PeerBanned:
    """A peer sent bad bytes and is not connected again."""

    info_hash: InfoHash
    peer: PeerAddress


@dataclass(frozen=True, slots=True)
class Finished:
    """Every piece passed; the bytes may not be in the file yet."""

    info_hash: InfoHash


@dataclass(frozen=True, slots=True)
class CacheFlushed:
    """What was queued for the file has been written to it."""

    info_hash: InfoHash


@dataclass(frozen=True, slots=True)
class FileRenamed:
    """The torrent's file has its new name; `error` is empty, or why it has not."""

    info_hash: InfoHash
    error: str


@dataclass(frozen=True, slots=True)
class FileFailed:
    """Reading or writing the file failed, and the torrent stopped."""

    info_hash: InfoHash
    errno: int
    message: str


@dataclass(frozen=True, slots=True)
class ResumeSaved:
    """What continues a torrent. `data` is empty if libtorrent gives none."""

    info_hash: InfoHash
    data: bytes
    piece_layer: bytes
    """32 bytes a piece, or empty while not all of it is known."""


@dataclass(frozen=True, slots=True)
class PiecesAvailable:
    """How many connected peers have each piece; empty if that is not counted: no peer, or nothing missing."""

    info_hash: InfoHash
    peers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Removed:
    """A torrent left the session."""

    info_hash: InfoHash


@dataclass(frozen=True, slots=True)
class TorrentStatus:
    """How far a torrent is."""

    info_hash: InfoHash
    state: str
    bytes_done: int
    """Bytes that passed their check, and those of pieces under way."""
    download_rate_bytes_s: int
    peers: int
    """Connected now."""
    served: int
    """Peers that may take bytes from this node now."""
    pieces: tuple[bool, ...] | None
    """Which pieces passed; None if the request was without."""


@dataclass(frozen=True, slots=True)
class SessionCounters:
    """Payload totals since the session began, in bytes."""

    uploaded_bytes: int
    downloaded_bytes: int
    peers: int


Event = (
    Checked
    | StateChanged
    | PieceFinished
    | HashFailed
    | PeerBanned
    | Finished
    | CacheFlushed
    | FileRenamed
    | FileFailed
    | ResumeSaved
    | PiecesAvailable
    | Removed
    | TorrentStatus
    | SessionCounters
)


class AlertPump:
    """Reads a session's alerts on the running loop and hands each event to `sink`, in order."""

    def __init__(self, session: Any, sink: Callable[[Event], None]) -> None:
        self._session = session
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._loop.add_reader(self._reader.fileno(), self._drain)
        session.set_alert_fd(self._writer.fileno())

    def detach(self) -> None:
        """Stop reading, and drop the session."""
        self._loop.remove_reader(self._reader.fileno())
        self._session = None

    def close(self) -> None:
        """Close the descriptors. The session must be gone first, since it writes to one of them."""
        self._reader.close()
        self._writer.close()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
        for alert in self._session.pop_alerts():
            for event in _events(alert):
                self._sink(event)


def _events(alert: Any) -> tuple[Event, ...]:
    match type(alert):
        case lt.state_update_alert:
            return tuple(_status(status) for status in alert.status)
        case lt.session_stats_alert:
            values = alert.values
            return (SessionCounters(*(values[name] for name in _COUNTERS)),)
        case lt.torrent_removed_alert:
            return (Removed(_v2(alert.info_hashes)),)
    translate = _BY_TYPE.get(type(alert))
    if translate is None:
        return ()
    return (translate(_v2(alert.handle.info_hashes()), alert),)


_COUNTERS = ("net.sent_payload_bytes", "net.recv_payload_bytes", "peer.num_peers_connected")

_BY_TYPE: dict[type[Any], Callable[[InfoHash, Any], Event]] = {
    lt.torrent_checked_alert: lambda h, _: Checked(h),
    lt.state_changed_alert: lambda h, a: StateChanged(h, str(a.state)),
    lt.piece_finished_alert: lambda h, a: PieceFinished(h, a.piece_index),
    lt.hash_failed_alert: lambda h, a: HashFailed(h, a.piece_index),
    lt.peer_ban_alert: lambda h, a: PeerBanned(h, PeerAddress(*a.endpoint)),
    lt.torrent_finished_alert: lambda h, _: Finished(h),
    lt.cache_flushed_alert: lambda h, _: CacheFlushed(h),
    lt.file_renamed_alert: lambda h, _: FileRenamed(h, ""),
    lt.file_rename_failed_alert: lambda h, a: FileRenamed(h, a.message()),
    lt.file_error_alert: lambda h, a: FileFailed(h, a.error.value(), a.message()),
    lt.save_resume_data_alert: lambda h, a: _resume(h, a.params),
    lt.piece_availability_alert: lambda h, a: PiecesAvailable(h, tuple(a.piece_availability)),
    lt.save_resume_data_failed_alert: lambda h, _: ResumeSaved(h, b"", b""),
}


def _resume(info_hash: InfoHash, params: Any) -> ResumeSaved:
    try:
        found: Any = lt.write_torrent_file(params)
        layers = found.get(b"piece layers", {})
    except RuntimeError:
        layers = {}  # some hashes of the layer have not come yet
    return ResumeSaved(info_hash, lt.bencode(lt.write_resume_data(params)), next(iter(layers.values()), b""))


def _status(status: Any) -> TorrentStatus:
    pieces = status.pieces
    return TorrentStatus(
        info_hash=_v2(status.info_hashes),
        state=str(status.state),
        bytes_done=status.total_done,
        download_rate_bytes_s=status.download_payload_rate,
        peers=status.num_peers,
        served=status.num_uploads,
        pieces=tuple(pieces) if pieces else None,
    )


def _v2(hashes: Any) -> InfoHash:
    return InfoHash(str(hashes.v2))
