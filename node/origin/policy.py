"""Which origins a stranger may name: a manifest or a request must not make this node send requests to its own network.

The operator of a node may configure any origin. A stranger may name stores whose address is in our settings (o3, akave,
s3, hf) and https:// at hosts of the public internet; never files, http://, this machine or a private network.
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
    """Why a stranger's origin is refused, as the end of a sentence; None if it may be used.

    Looks at the text of the URL alone: `check_host` looks at the addresses of its host.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "its URL is malformed"
    if parts.scheme in OUR_ENDPOINTS:
        return None
    if parts.scheme != "https":
        return f"{parts.scheme}:// is allowed in a node's own settings only"
    if not host or parts.username is not None or parts.password is not None:
        return "it has no plain host"
    try:
        return None if is_public(host) else f"{host} is not an address of the public internet"
    except ValueError:
        pass
    name = host.rstrip(".")
    if "." not in name or name.endswith(_PRIVATE_SUFFIXES) or _NUMBER.fullmatch(name.rpartition(".")[2]):
        return f"{host} is not a host of the public internet"
    return None


def is_public(address: str) -> bool:
    """Whether an IP address, and any IPv4 address embedded in it, belongs to the public internet. Raises ValueError."""
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
    """The settings for an origin that a stranger named: files of others are not encrypted with our key."""
    return replace(settings, encryption_key_file=None) if url.startswith(("https://", "hf://")) else settings


async def check_host(url: str) -> None:
    """Resolve the host of a stranger's https:// origin.

    Raises OriginDeniedError if one of its addresses is not public, OriginUnavailableError if it cannot be resolved.
    """
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
            f"origin {url} is not asked: {host} has the address {bad[0]}, which is not one of the public internet; if "
            "you trust it, give it to this node with --origin",
            details,
        )
