"""The HTTP side of a node: whether it is alive, and its figures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class HttpServer:
    """`/healthz` answers 200 with a small JSON map while the node runs; `/metrics` is Prometheus text."""

    def __init__(self, port: int) -> None:
        self.port = port

    @classmethod
    @asynccontextmanager
    async def serve(
        cls, host: str, port: int, *, health: Callable[[], Mapping[str, Any]], metrics: Callable[[], Awaitable[bytes]]
    ) -> AsyncIterator[HttpServer]:
        """Listen until the context ends. Raises OSError if the address is taken."""

        async def healthz(_: web.Request) -> web.Response:
            return web.json_response(dict(health()))

        async def metrics_page(_: web.Request) -> web.Response:
            return web.Response(body=await metrics(), headers={"Content-Type": _METRICS_TYPE})

        app = web.Application(client_max_size=64 * 1024)
        app.add_routes([web.get("/healthz", healthz), web.get("/metrics", metrics_page)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
            yield cls(runner.addresses[0][1])
        finally:
            await runner.cleanup()
