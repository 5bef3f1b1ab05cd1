"""The processes that scripts.bench.swarm starts: a seed, a downloader, an HTTP server, an HTTP client.

Each says and hears JSON, a line at a time, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web

from node.swarm import PeerAddress, Swarm, SwarmSettings, Torrent
from protocol.content import ContentHash

HOST = "127.0.0.1"
MIB = 1024 * 1024
LIMIT_S = 300.0


def say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


async def hear() -> dict[str, Any]:
    line = await asyncio.to_thread(sys.stdin.readline)
    return json.loads(line) if line else {}


async def be_seed(path: Path, work: Path, limit: int, hashed: ContentHash) -> None:
    torrent = Torrent.of("shard", hashed.size, hashed.content_id)
    async with Swarm.open(SwarmSettings(work / "state", upload_limit_bytes_s=limit)) as swarm:
        await swarm.seed(torrent, path, hashed.piece_layer)
        say({"port": swarm.port})
        await hear()
        await asyncio.sleep(1.2)  # statistics are at most a second old
        say({"uploaded": swarm.stats().uploaded_bytes})


async def be_downloader(work: Path, hashed: ContentHash) -> None:
    torrent = Torrent.of("shard", hashed.size, hashed.content_id)
    async with Swarm.open(SwarmSettings(work / "state")) as swarm:
        say({"port": swarm.port})
        peers = [PeerAddress(HOST, port) for port in (await hear())["ports"] if port != swarm.port]
        download = await swarm.download(torrent, work / "shard")
        download.add_peers(peers)
        await download.verified()
        say({"done": time.monotonic()})
        await hear()  # goes on to seed until all are done


async def be_http_server(path: Path) -> None:
    app = web.Application()
    app.router.add_get("/shard", lambda _: web.FileResponse(path))
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, HOST, 0)
    await site.start()
    say({"port": runner.addresses[0][1]})
    await hear()
    await runner.cleanup()


async def be_http_client(work: Path, port: int) -> None:
    say({"ready": True})
    await hear()
    async with (
        ClientSession(timeout=ClientTimeout(total=LIMIT_S), read_bufsize=MIB) as session,
        session.get(f"http://{HOST}:{port}/shard") as answer,
    ):
        with (work / "shard").open("wb") as file:
            async for block in answer.content.iter_chunked(MIB):
                file.write(block)
    say({"done": time.monotonic()})
    await hear()


def described(value: str) -> ContentHash:
    size, content_id, layer = json.loads(value)
    return ContentHash(size, content_id, bytes.fromhex(layer))


def main() -> None:
    match sys.argv[1:]:
        case ["seed", path, work, limit, value]:
            asyncio.run(be_seed(Path(path), Path(work), int(limit), described(value)))
        case ["download", work, value]:
            asyncio.run(be_downloader(Path(work), described(value)))
        case ["http-server", path]:
            asyncio.run(be_http_server(Path(path)))
        case ["http-client", work, port]:
            asyncio.run(be_http_client(Path(work), int(port)))


if __name__ == "__main__":
    main()
