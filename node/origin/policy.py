"""Which origins that somebody else named may be asked: a manifest, or a request, must not aim this node at its own
network.

Who runs a node may configure any origin. A stranger may name stores whose address is a setting of ours (o3, akave, s3,
hf), and https at hosts of the public internet; never files, http, this machine or a private network.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from dataclasses import replace
from urllib.parse import urlsplit

from node.origin.settings import OriginSettings
from protocol.errors import OriginDeniedError, OriginUnavailableError

OUR_ENDPOINTS = frozenset({"o3", "akave", "s3", "hf"})
RESOLVE_TIMEOUT_S = 10.0
_PRIVATE_SUFFIXES = (".localhost", ".local", ".internal", ".intranet", ".lan", ".home", ".corp", ".home.arpa")
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*", re.IGNORECASE)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def refusal(url: str) -> str | None:
    """Why a stranger's origin is not asked, as the end of a sentence; None where it may be.

    Looks at the text alone; of a host name `check_host` has to look at the addresses too.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "its URL cannot be read"
    if parts.scheme in OUR_ENDPOINTS:
        return None
    if parts.scheme != "https":
        return f"{parts.scheme}:// is taken from a node's own settings alone"
    if not host or parts.username is not None or parts.password is not None:
        return "it has no plain host"
    try:
        return None if is_public(host) else f"{host} is no address of the public internet"
    except ValueError:
        pass
    name = host.rstrip(".")
    if "." not in name or name.endswith(_PRIVATE_SUFFIXES) or _NUMBER.fullmatch(name.rpartition(".")[2]):
        return f"{host} is no host of the public internet"
    return None


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, what it carries inside included. Raises ValueError."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if ip.ipv4_mapped:
            return is_public(str(ip.ipv4_mapped))
    return ip.is_global and not ip.is_multicast and all(one is None or is_public(str(one)) for one in inner)


def for_stranger(url: str, settings: OriginSettings) -> OriginSettings:
    """What an origin that a stranger named is opened with: others' files are as they are, our key is not theirs."""
    return replace(settings, encryption_key_file=None) if url.startswith(("https://", "hf://")) else settings


async def check_host(url: str) -> None:
    """Look at the addresses behind a stranger's https origin. Raises OriginDeniedError, OriginUnavailableError."""
    parts = urlsplit(url)
    if parts.scheme in OUR_ENDPOINTS:
        return
    host = parts.hostname or ""
    details = {"origin": url, "key": "", "status": "", "tried": 1}
    try:
        async with asyncio.timeout(RESOLVE_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, parts.port or 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # TimeoutError among them
        raise OriginUnavailableError(f"origin {url}: the host {host} cannot be resolved", details) from None
    if bad := [str(one[4][0]) for one in found if not is_public(str(one[4][0]))]:
        raise OriginDeniedError(
            f"origin {url} is not asked: {host} leads to {bad[0]}, no address of the public internet; if you trust it, "
            "give it to this node by --origin",
            details,
        )
