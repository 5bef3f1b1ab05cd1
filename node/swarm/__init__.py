"""Shards between nodes, by BitTorrent v2. The only package that imports libtorrent.

torrent       a shard as a torrent; peers and pieces as plain values
settings      what a node may choose, and what that means to libtorrent
alerts        libtorrent's alerts by file descriptor, as frozen events
handle        one torrent in the session: commands, and awaited answers
session       TorrentSession, the libtorrent session: opened, asked, closed
part_file     a download on disk, and what continues it after a stop or a crash
piece_layer   the piece layer of a download: from peers, or handed over
watchdog      when a download is restarted, one peer at a time
download      from reserved space to a checked file; pieces may be given by the caller
swarm         all seeds and downloads of a node, and how many peers a seed sends to at once
"""

from node.swarm.download import Download
from node.swarm.piece_layer import piece_fits
from node.swarm.settings import SwarmSettings
from node.swarm.swarm import Swarm, SwarmStats
from node.swarm.torrent import DownloadProgress, PeerAddress, Piece, Torrent

__all__ = [
    "Download",
    "DownloadProgress",
    "PeerAddress",
    "Piece",
    "Swarm",
    "SwarmSettings",
    "SwarmStats",
    "Torrent",
    "piece_fits",
]
