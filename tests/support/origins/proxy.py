"""A reverse proxy in front of an S3 server that counts what leaves it, slows it down, and does wrong on demand.

    python -m tests.support.origins.proxy --upstream http://127.0.0.1:9110 --rate 8000000
    curl -X POST localhost:CONTROL/faults -d '{"kind": "status", "status": 503, "times": 20}'

In a program or a test:

    async with OriginProxy.running("http://127.0.0.1:9110", rate_bytes_s=8e6) as proxy:
        proxy.rules.add(Fault(kind="truncate", after_bytes=100_000, times=1))
        ...                                     # clients address proxy.endpoint
        proxy.ledger.payload_bytes("shards/")   # what left; proxy.ledger.repeated(...): what left twice

Requests and answers pass as they are, the Host header among them, so a signature that a client made for the proxy's
host and port holds. As a program it says on one line of stdout, as JSON, where it is; over the control endpoint, on a
port of its own: GET /sent, POST /reset, POST /faults, DELETE /faults, POST /gone and POST /back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import aiohttp
from aiohttp import web
from yarl import URL

from tests.support.origins.control import control
from tests.support.origins.faults import ERRORS, EXPIRED_SIGNATURE, Fault, Ledger, Range, Rules, Sent, error_body
from tests.support.origins.presigned import presigned_url

HOST = "127.0.0.1"
BLOCK_BYTES = 64 * 1024
"""Written, counted and paid for at once."""
BURST_S = 0.05
"""So much of a second may leave at once after a pause; a sleep that took too long is made good from it."""
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
"""RFC 9110, section 7.6.1; they are between two neighbours, not between client and origin."""


class TokenBucket:
    """One rate for all connections, first come, first served."""

    def __init__(self, rate_bytes_s: float) -> None:
        self.rate_bytes_s = rate_bytes_s
        """0: no limit."""
        self._free_at = 0.0

    async def take(self, size: int) -> None:
        """Wait until so many bytes may leave."""
        if self.rate_bytes_s <= 0:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now - BURST_S) + size / self.rate_bytes_s
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


class OriginProxy:
    """Made by `running`. `rules`, `ledger` and `bucket` may be used and changed at any time."""

    def __init__(self, upstream: str, keys: tuple[str, str] | None, rate_bytes_s: float, port: int) -> None:
        self.rules = Rules()
        self.ledger = Ledger()
        self.bucket = TokenBucket(rate_bytes_s)
        self._upstream = upstream.rstrip("/")
        self._keys = keys
        # Bound and never listening: while the proxy is gone the port stays its own, and a connection is refused.
        self._place = _bound(port)
        self.port: int = self._place.getsockname()[1]
        self.endpoint = f"http://{HOST}:{self.port}"
        app = web.Application(client_max_size=1 << 60)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
        self._site: web.SockSite | None = None
        self._session: aiohttp.ClientSession | None = None
        self._transports: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()

    @classmethod
    @asynccontextmanager
    async def running(
        cls,
        upstream: str,
        *,
        keys: tuple[str, str] | None = None,
        rate_bytes_s: float = 0,
        port: int = 0,
    ) -> AsyncIterator[OriginProxy]:
        """Serve on loopback until the context ends. `keys`, access and secret, are what `ignore_range` signs with:
        a client's own signature may cover the Range that is left out.
        """
        proxy = cls(upstream, keys, rate_bytes_s, port)
        try:
            async with aiohttp.ClientSession(
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            ) as proxy._session:
                await proxy._runner.setup()
                await proxy.back()
                try:
                    yield proxy
                finally:
                    await proxy.gone()
                    await proxy._runner.cleanup()
                    for transport in proxy._transports:
                        if transport.get_write_buffer_size():  # closed, and with something for who does not read
                            transport.abort()
        finally:
            proxy._place.close()

    async def gone(self) -> None:
        """Break every connection and refuse new ones, until `back`."""
        site, self._site = self._site, None
        if site:
            await site.stop()
        assert self._runner.server is not None
        for connection in list(self._runner.server.connections):
            if connection.transport:
                connection.transport.abort()

    async def back(self) -> None:
        """Take connections again, on the same port."""
        if self._site is None:
            self._site = web.SockSite(self._runner, _bound(self.port))
            await self._site.start()

    # One request.

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.ledger.requests += 1
        if request.transport:
            self._transports.add(request.transport)
        key = request.rel_url.path.lstrip("/")
        asked = Range.asked(request.headers.get("Range"))
        fault = self.rules.take(request.method, key, asked)
        match fault:
            case Fault(kind="status" | "expired"):
                return _error(fault, key, request.method)
            case Fault(kind="hang"):
                await asyncio.Event().wait()  # until the client leaves, or the proxy ends
        assert self._session is not None
        url, headers = self._upstream + request.raw_path, _end_to_end(request.headers)
        if fault and fault.kind == "ignore_range":
            if self._keys is None:
                raise RuntimeError("ignore_range needs the keys of the server behind")
            url, headers = presigned_url(self._upstream, key, *self._keys, method=request.method), []
        try:
            async with self._session.request(
                request.method,
                URL(url, encoded=True),
                headers=headers,
                data=request.content.iter_chunked(BLOCK_BYTES) if request.body_exists else None,
                allow_redirects=False,
            ) as answer:
                return await self._pass_on(request, answer, key, asked, fault)
        except aiohttp.ClientConnectorError as err:
            return web.Response(status=502, text=f"nothing answers behind the proxy: {err.strerror}\n")

    async def _pass_on(
        self,
        request: web.Request,
        answer: aiohttp.ClientResponse,
        key: str,
        asked: Range | None,
        fault: Fault | None,
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=_end_to_end(answer.headers))
        await response.prepare(request)
        is_payload = request.method == "GET" and answer.status in (200, 206) and bool(key.partition("/")[2])
        start = asked.start if asked and answer.status == 206 else 0
        sent = Sent(key=key, start=start, asked=asked, fault=fault.kind if fault else "")
        if is_payload:
            self.ledger.sent.append(sent)
        cut = fault.after_bytes if fault and is_payload and fault.kind in ("truncate", "stall") else None
        async for block in answer.content.iter_chunked(BLOCK_BYTES):
            if request.transport is None or request.transport.is_closing():
                return response  # the client has left
            if fault and fault.kind == "wrong_bytes":
                block = _spoiled(block, fault.offset - start - sent.size)
            kept = block if cut is None else block[: cut - sent.size]
            await self.bucket.take(len(kept))
            sent.size += len(kept)  # before it goes: who has it may look at the ledger at once
            try:
                await response.write(kept)
            except ConnectionResetError:
                sent.size -= len(kept)
                return response
            if cut is not None and sent.size >= cut:
                if fault and fault.kind == "stall":
                    await asyncio.Event().wait()
                if request.transport:
                    request.transport.close()  # what was written goes out, then the connection ends
                return response
        if request.method != "HEAD":
            await response.write_eof()
        return response


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    # What the kernel holds of an answer has left as far as the ledger knows: little, so that it means something.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BLOCK_BYTES)
    sock.bind((HOST, port))
    return sock


def _end_to_end(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """What passes. Expect does not: the server class of this proxy has answered it."""
    return [(name, value) for name, value in headers.items() if name.lower() not in _HOP_BY_HOP | {"expect"}]


def _spoiled(block: bytes, offset: int) -> bytes:
    """The block with the byte at `offset` in it changed; unchanged where it lies elsewhere."""
    if not 0 <= offset < len(block):
        return block
    return block[:offset] + bytes([block[offset] ^ 0xFF]) + block[offset + 1 :]


def _error(fault: Fault, key: str, method: str) -> web.Response:
    status = fault.status or (400 if fault.kind == "expired" else 503)
    code, message = ERRORS.get(status, (f"Status{status}", "An error that was asked for."))
    if fault.kind == "expired" and status == 403:
        code, message = EXPIRED_SIGNATURE
    headers = {"Content-Type": "application/xml"}
    if fault.retry_after_s is not None:
        headers["Retry-After"] = str(fault.retry_after_s)
    return web.Response(
        status=status, headers=headers, body=None if method == "HEAD" else error_body(code, message, key)
    )


# As a program.


async def serve(args: argparse.Namespace) -> None:
    ends = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ends.set)
    keys = (args.access_key, args.secret_key) if args.access_key else None
    async with OriginProxy.running(args.upstream, keys=keys, rate_bytes_s=args.rate, port=args.port) as proxy:
        runner = web.AppRunner(control(proxy), access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        try:
            await web.TCPSite(runner, HOST, args.control_port).start()
            said = {"endpoint": proxy.endpoint, "control": f"http://{HOST}:{runner.addresses[0][1]}"}
            print(json.dumps(said), flush=True)
            await ends.wait()
        finally:
            await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", required=True, help="the S3 server, http://host:port")
    parser.add_argument("--rate", type=float, default=0, help="bytes/s of all answers together; 0: no limit")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--control-port", type=int, default=0)
    parser.add_argument("--access-key", default="", help="of the server behind, for the fault ignore_range")
    parser.add_argument("--secret-key", default="")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
