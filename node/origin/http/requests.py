"""One HTTP request and its answer, through aiohttp: connections, redirects, proxies, and aiohttp's errors as ours."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import aiohttp
from yarl import URL

from node.origin.core.errors import corrupt_error, origin_error, status_error, unreachable_error
from node.origin.core.fork_guard import expect_own_process
from node.origin.core.retry import retry_after_s
from node.origin.policy import check_host, refusal
from node.origin.settings import OriginSettings
from node.origin.url import is_loopback
from protocol.errors import OriginDeniedError, OriginError

CONNECTIONS = 16
MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 18
_REDIRECTS = (301, 302, 303, 307, 308)


class ObjectRequest(NamedTuple):
    """A request about one object."""

    url: str
    key: str
    did: str
    """What is done to the object, for messages: "read bytes 0 to 5 of"."""


class HttpClient:
    """Sends requests to one origin, and to where it redirects. Repeats none."""

    def __init__(self, origin: str, settings: OriginSettings, headers: Mapping[str, str], credentials: str) -> None:
        self._origin = origin
        self._settings = settings
        self._headers = dict(headers)
        self._credentials = credentials
        self._session: aiohttp.ClientSession | None = None
        self._process = os.getpid()

    async def answer(
        self, method: str, request: ObjectRequest, headers: Mapping[str, str] | None = None
    ) -> aiohttp.ClientResponse:
        """An answer whose status is a success; its body is still to come, and the caller closes it.

        Credentials do not follow a redirect to another host, and no redirect leads from the internet to this machine or
        a private network. Raises OriginError and its children.
        """
        url = request.url
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._once(method, url, request, headers or {})
            if answer.status not in _REDIRECTS:
                if 200 <= answer.status < 300:
                    return answer
                answer.close()
                raise status_error(
                    answer.status,
                    "",
                    request.did,
                    origin=self._origin,
                    key=request.key,
                    retry_after_s=retry_after_s(answer.headers.get("Retry-After")),
                    credentials=self._credentials,
                )
            answer.close()
            url = await self._next(url, answer.headers.get("Location", ""), request)
        raise origin_error(
            OriginError, request.did, "it redirects in circles", "check the URL", origin=self._origin, key=request.key
        )

    async def body(self, answer: aiohttp.ClientResponse, request: ObjectRequest) -> AsyncIterator[bytes]:
        """The bytes of an answer as they come. Raises OriginCorruptError if it breaks off."""
        try:
            async for data in answer.content.iter_chunked(CHUNK_BYTES):
                yield data
        except aiohttp.ClientPayloadError:
            raise corrupt_error(
                request.did, "its answer broke off", origin=self._origin, key=request.key, broke_off=True
            ) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(request, error) from None

    async def close(self) -> None:
        """Close the connections; the next request opens them again."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _once(
        self, method: str, url: str, request: ObjectRequest, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        own = _host(url) == _host(request.url)
        try:
            return await self._open().request(
                method,
                URL(url, encoded=True),
                headers={**(self._headers if own else {}), **headers},
                allow_redirects=False,
                proxy=_proxy(url),
            )
        except OriginError:
            raise
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self._unreachable(request, error) from None

    async def _next(self, url: str, location: str, request: ObjectRequest) -> str:
        target = urljoin(url, location) if location else ""
        if location and _host(target) == _host(request.url):
            return target
        if is_loopback(urlsplit(request.url).hostname or "") and is_loopback(urlsplit(target).hostname or ""):
            return target
        # The message names the host only: the URL may be signed.
        if refusal(target) is not None:
            found = f"it redirects to {urlsplit(target).hostname or 'nowhere'}"
            advice = "an origin may not redirect there; if you trust that host, give this node its URL as an origin"
            raise origin_error(OriginDeniedError, request.did, found, advice, origin=self._origin, key=request.key)
        await check_host(f"https://{urlsplit(target).netloc}")
        return target

    def _open(self) -> aiohttp.ClientSession:
        expect_own_process(self._origin, self._process)
        if self._session is None or self._session.closed:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS),
                timeout=aiohttp.ClientTimeout(
                    total=self._settings.timeout_s,
                    sock_connect=self._settings.connect_timeout_s,
                    sock_read=self._settings.read_timeout_s,
                ),
                auto_decompress=False,
                headers={"User-Agent": "shoal", "Accept-Encoding": "identity"},
            )
        return self._session

    def _unreachable(self, request: ObjectRequest, error: Exception) -> OriginError:
        match error:
            case TimeoutError():
                found = "nothing came in time"
            case aiohttp.ClientConnectorDNSError():
                found = "its name is not known"
            case aiohttp.ClientConnectorCertificateError() | aiohttp.ClientSSLError():
                found = "its certificate is not trusted"
            case aiohttp.ClientConnectorError():
                found = f"no connection: {os.strerror(error.os_error.errno or 0).lower()}"
            case _:
                found = "the connection broke"
        return unreachable_error(request.did, found, origin=self._origin, key=request.key)


def _host(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL. (aiohttp's `trust_env` would read ~/.netrc too.)"""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return (
        None
        if is_loopback(host) or urllib.request.proxy_bypass(host)
        else urllib.request.getproxies().get(parts.scheme)
    )
