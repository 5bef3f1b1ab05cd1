"""Settings of the swarm, and what they mean to libtorrent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libtorrent as lt

_ALERTS = (
    lt.alert_category.error
    | lt.alert_category.status
    | lt.alert_category.storage
    | lt.alert_category.piece_progress
    | lt.alert_category.file_progress
)


@dataclass(frozen=True, slots=True)
class SwarmSettings:
    """How a node takes part in swarms. Limits are totals over all torrents, on loopback and local networks too."""

    state_dir: Path
    """Folder for what continues a download after a stop; made if missing."""
    listen_host: str = "127.0.0.1"
    """IP address to listen on and to connect from."""
    port: int = 0
    """TCP port; 0 takes a free one."""
    upload_limit_bytes_s: int = 0
    """0 for none."""
    download_limit_bytes_s: int = 0
    """0 for none."""
    stall_s: float = 3.0
    """A download that gets nothing for so long after a bad piece is restarted, its peers tried one at a time."""
    stop_timeout_s: float = 2.0
    """How long a download that is stopped waits for its resume data."""
    refresh_s: float = 0.5
    """How often totals and the status of torrents are asked for."""
    ask_every_s: float = 1.0
    """How often a download asks for the piece layer, and which pieces peers have, at most."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: it must be 0 (any free one) to 65535")
        for name in ("upload_limit_bytes_s", "download_limit_bytes_s", "stop_timeout_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")
        for name in ("stall_s", "refresh_s", "ask_every_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name):g}: it must be above 0")


def session_params(settings: SwarmSettings) -> Any:
    """Parameters for a libtorrent session. The choices were measured on a LAN-like loopback with libtorrent 2.1.1."""
    host = f"[{settings.listen_host}]" if ":" in settings.listen_host else settings.listen_host
    params = lt.session_params()
    # pread with a short write queue: faster than mmap, and what a kill -9 can lose stays small.
    params.disk_io_constructor = "pread_disk_io_constructor"
    params.settings = {
        "alert_mask": int(_ALERTS),
        "alert_queue_size": 100_000,
        "listen_interfaces": f"{host}:{settings.port}",
        "user_agent": "shoal",
        # Peers come from Shoal's own discovery and from peer exchange; nothing calls out.
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "dht_bootstrap_nodes": "",
        "webtorrent_stun_server": "",
        "stop_tracker_timeout": 0,
        # uTP is ten times slower than TCP on a LAN.
        "enable_outgoing_utp": False,
        "enable_incoming_utp": False,
        # Several nodes may share one address.
        "allow_multiple_connections_per_ip": True,
        "upload_rate_limit": settings.upload_limit_bytes_s,
        "download_rate_limit": settings.download_limit_bytes_s,
        "ignore_limits_on_local_network": False,
        "rate_limit_ip_overhead": False,
        # A short queue stays in the processor's cache: 1 GiB to one downloader in 3.6 s, in 4.3 s with 8 MiB.
        "max_queued_disk_bytes": 2 * 1024 * 1024,
        "aio_threads": 2,
        "hashing_threads": 2,
        # What waits in the kernel when a node is killed moves twice: with the kernel's own bound 20 to 30 MiB did, with
        # this one 2 to 11. A third of it costs a lone downloader 20 % of its speed.
        "recv_socket_buffer_size": 3 * 1024 * 1024,
        # Encryption without authentication costs half the speed and protects nothing.
        "out_enc_policy": int(lt.enc_policy.pe_disabled),
        "in_enc_policy": int(lt.enc_policy.pe_disabled),
        # The bound on slots is each file's own (UploadSlots in swarm.py). With -1 here libtorrent never reconsiders
        # which peers have one.
        "unchoke_slots_limit": 10_000,
        "active_seeds": -1,
        "active_downloads": -1,
        "active_limit": -1,
        "connections_limit": 1000,
        # What is asked for is not asked for elsewhere: a short queue keeps downloaders from asking one seed for the
        # same pieces.
        "request_queue_time": 1,
        # A downloader whose last missing pieces are all asked for drops its seeds as uninteresting; if such a piece
        # does not come it needs them again. With the default minute six of eight nodes stood still for 20 s.
        "min_reconnect_time": 1,
        # Connect to peers at once, not one a tick.
        "smooth_connects": False,
        "connection_speed": 200,
    }
    return params
