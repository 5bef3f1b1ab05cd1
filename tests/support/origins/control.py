"""What another process may ask of a running origin proxy, over HTTP on a port of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from tests.support.origins.faults import Fault

if TYPE_CHECKING:
    from tests.support.origins.proxy import OriginProxy


def control(proxy: OriginProxy) -> web.Application:
    """What another process may ask of the proxy."""

    async def sent(request: web.Request) -> web.Response:
        key = request.query.get("key", "")
        ledger = proxy.ledger
        told = {
            "requests": ledger.requests,
            "payload_bytes": ledger.payload_bytes(key),
            "repeated_bytes": ledger.repeated(key),
            "applied": proxy.rules.applied,
            "sent": ledger.of(key),
        }
        return web.Response(body=msgspec.json.encode(told), content_type="application/json")

    async def reset(request: web.Request) -> web.Response:
        proxy.ledger.reset()
        return web.Response(status=204)

    async def add(request: web.Request) -> web.Response:
        try:
            proxy.rules.add(msgspec.json.decode(await request.read(), type=Fault))
        except msgspec.DecodeError as err:
            return web.Response(status=400, text=f"not a fault: {err}\n")
        return web.Response(status=204)

    async def clear(request: web.Request) -> web.Response:
        proxy.rules.clear()
        return web.Response(status=204)

    async def gone(request: web.Request) -> web.Response:
        await proxy.gone()
        return web.Response(status=204)

    async def back(request: web.Request) -> web.Response:
        await proxy.back()
        return web.Response(status=204)

    app = web.Application()
    app.add_routes([web.get("/sent", sent), web.post("/reset", reset), web.post("/faults", add)])
    app.add_routes([web.delete("/faults", clear), web.post("/gone", gone), web.post("/back", back)])
    return app
