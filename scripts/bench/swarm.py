"""How fast one seed feeds N downloaders, beside aria2c and plain HTTP on the same bytes, in one run.

    python -m scripts.bench.swarm                          # 1 GiB for one downloader, 128 MiB for N = 1, 2, 4, 8
    python -m scripts.bench.swarm --rounds 1 --only capped

Every seed and every downloader is a process of its own that uses `node.swarm` as a node does; each is told the
addresses of the seed and of the other downloaders, as discovery would tell it. Rounds are interleaved and medians
printed, as a markdown table. All traffic is loopback: the processes share this machine's cores, so ratios mean more
than speeds. Needs aiohttp; aria2c where it is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from protocol.content import ContentHash, hash_file

HOST = "127.0.0.1"
MIB = 1024 * 1024
LIMIT_S = 300.0


@dataclass(frozen=True)
class Outcome:
    """One run: all downloaders began at once."""

    seconds: float
    """Until the last had its file, checked."""
    egress_bytes: int
    """Payload that the seed sent; 0 where it is not known."""


@contextlib.asynccontextmanager
async def child(*args: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "scripts.bench.swarm_child", *args),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def ask(process: asyncio.subprocess.Process, value: dict[str, Any] | None = None) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    if value is not None:
        process.stdin.write(json.dumps(value).encode() + b"\n")
        await process.stdin.drain()
    async with asyncio.timeout(LIMIT_S):
        line = await process.stdout.readline()
    if not line:
        raise RuntimeError("a child of the benchmark ended early")
    return json.loads(line)


async def run_shoal(path: Path, hashed: ContentHash, n: int, limit: int, work: Path) -> Outcome:
    described = json.dumps([hashed.size, hashed.content_id, hashed.piece_layer.hex()])
    async with contextlib.AsyncExitStack() as stack:
        seed_dir = folder(work / "seed")
        seed = await stack.enter_async_context(child("seed", str(path), str(seed_dir), str(limit), described))
        ports = [(await ask(seed))["port"]]
        nodes = []
        for i in range(n):
            place = folder(work / f"node-{i}")
            nodes.append(await stack.enter_async_context(child("download", str(place), described)))
        ports += [answer["port"] for answer in await asyncio.gather(*map(ask, nodes))]
        began = time.monotonic()
        answers = await asyncio.gather(*(ask(node, {"ports": ports}) for node in nodes))
        uploaded = (await ask(seed, {}))["uploaded"]
    return Outcome(max(answer["done"] for answer in answers) - began, uploaded)


async def run_http(path: Path, n: int, work: Path) -> Outcome:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(child("http-server", str(path)))
        port = (await ask(server))["port"]
        clients = [
            await stack.enter_async_context(child("http-client", str(folder(work / f"http-{i}")), str(port)))
            for i in range(n)
        ]
        await asyncio.gather(*map(ask, clients))
        began = time.monotonic()
        answers = await asyncio.gather(*(ask(each, {}) for each in clients))
    return Outcome(max(answer["done"] for answer in answers) - began, n * path.stat().st_size)


async def run_aria2c(path: Path, torrent: Path, n: int, work: Path) -> Outcome:
    """aria2c seeds to aria2c; a tracker of a few lines tells them of each other."""
    peers: set[int] = set()
    seeding = asyncio.Event()

    async def announce(request: web.Request) -> web.Response:
        peers.add(int(request.query["port"]))
        seeding.set()
        # BEP 23: six bytes a peer.
        compact = b"".join(bytes([127, 0, 0, 1]) + port.to_bytes(2, "big") for port in sorted(peers))
        return web.Response(body=b"d8:intervali1e12:min intervali1e5:peers%d:" % len(compact) + compact + b"e")

    app = web.Application()
    app.router.add_get("/announce", announce)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, HOST, 0)
    await site.start()
    common = [
        "aria2c",
        "--quiet",
        "--no-conf",
        "--enable-dht=false",
        "--enable-dht6=false",
        "--bt-enable-lpd=false",
        "--disable-ipv6=true",
        "--file-allocation=none",
        "--follow-torrent=mem",
        "--bt-max-peers=0",
        "--bt-tracker-interval=1",
        f"--bt-tracker=http://{HOST}:{runner.addresses[0][1]}/announce",
    ]
    seed = None
    fetchers: list[asyncio.subprocess.Process] = []
    try:
        seed = await asyncio.create_subprocess_exec(
            *common, "--bt-seed-unverified=true", "--seed-ratio=0", "-d", str(path.parent), str(torrent)
        )
        await seeding.wait()
        began = time.monotonic()
        for i in range(n):
            place = folder(work / f"aria-{i}")
            fetchers.append(
                await asyncio.create_subprocess_exec(*common, "--seed-time=0", "-d", str(place), str(torrent))
            )
        async with asyncio.timeout(LIMIT_S):
            codes = await asyncio.gather(*(fetcher.wait() for fetcher in fetchers))
        seconds = time.monotonic() - began
        if any(codes):
            raise RuntimeError(f"aria2c ended with {codes}")
        return Outcome(seconds, 0)
    finally:
        for process in [*fetchers, *([seed] if seed else [])]:
            if process.returncode is None:
                process.kill()
                await process.wait()
        await runner.cleanup()


def folder(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def make_file(path: Path, size: int) -> ContentHash:
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    return hash_file(path)


def make_hybrid_torrent(path: Path) -> Path:
    """aria2c knows no v2; a hybrid torrent of the same bytes."""
    import libtorrent as lt

    created = lt.create_torrent(lt.list_files(str(path)), MIB)
    lt.set_piece_hashes(created, str(path.parent))
    torrent = path.with_suffix(".torrent")
    torrent.write_bytes(lt.bencode(created.generate()))
    return torrent


async def compare(args: argparse.Namespace, work: Path) -> None:
    taken: defaultdict[tuple[str, int], list[Outcome]] = defaultdict(list)
    aria = shutil.which("aria2c") is not None
    sizes: dict[str, int] = {}

    async def measure(name: str, n: int, size: int, run: Any) -> None:
        outcome = await run
        taken[name, n].append(outcome)
        sizes[name] = size
        for left in work.glob("*-*"):
            shutil.rmtree(left, ignore_errors=True)
        print(f"  {name}, N={n}: {outcome.seconds:.2f} s, egress {outcome.egress_bytes / size:.2f}", file=sys.stderr)

    if args.only in (None, "single"):
        path = work / "large" / "shard"
        folder(path.parent)
        size = args.large_mib * MIB
        hashed = await asyncio.to_thread(make_file, path, size)
        torrent = await asyncio.to_thread(make_hybrid_torrent, path)
        for _ in range(args.rounds):
            await measure("shoal, large", 1, size, run_shoal(path, hashed, 1, 0, work))
            if aria:
                await measure("aria2c, large", 1, size, run_aria2c(path, torrent, 1, work))
            await measure("http, large", 1, size, run_http(path, 1, work))
        shutil.rmtree(path.parent)
    path = work / "small" / "shard"
    folder(path.parent)
    size = args.small_mib * MIB
    hashed = await asyncio.to_thread(make_file, path, size)
    torrent = await asyncio.to_thread(make_hybrid_torrent, path)
    for _ in range(args.rounds):
        for n in args.nodes:
            if args.only in (None, "capped"):
                await measure("shoal, capped", n, size, run_shoal(path, hashed, n, args.cap, work))
            if args.only in (None, "uncapped"):
                await measure("shoal", n, size, run_shoal(path, hashed, n, 0, work))
                if aria:
                    await measure("aria2c", n, size, run_aria2c(path, torrent, n, work))
                await measure("http", n, size, run_http(path, n, work))
    report(taken, sizes, args)
    if args.json:
        record = [
            {"what": name, "n": n, "size_bytes": sizes[name], "seconds": run.seconds, "egress_bytes": run.egress_bytes}
            for (name, n), runs in taken.items()
            for run in runs
        ]
        args.json.write_text(json.dumps(record, indent=1))


def report(taken: dict[tuple[str, int], list[Outcome]], sizes: dict[str, int], args: argparse.Namespace) -> None:
    print(f"\n{args.rounds} rounds, medians; `large` is {args.large_mib} MiB, the rest {args.small_mib} MiB; ", end="")
    print(f"`capped`: the seed uploads at most {args.cap:,} bytes/s in total.\n")
    print("| what | N | last done, s | MiB/s a node | seed egress / file | last done / that of N = 1 |")
    print("|---|---|---|---|---|---|")
    seconds = {key: statistics.median(each.seconds for each in runs) for key, runs in taken.items()}
    for (name, n), runs in sorted(taken.items()):
        egress = statistics.median(each.egress_bytes for each in runs) / sizes[name]
        speed = sizes[name] / MIB / seconds[name, n]
        share = f"{seconds[name, n] / seconds[name, 1]:.2f}" if (name, 1) in seconds else ""
        print(f"| {name} | {n} | {seconds[name, n]:.2f} | {speed:.0f} | {egress:.2f} | {share} |")
    if ("aria2c, large", 1) in seconds:
        ratio = seconds["aria2c, large", 1] / seconds["shoal, large", 1]
        print(f"\nOne downloader against aria2c: {ratio:.2f} times its speed (goal 1.5).")
    if ("shoal, capped", 8) in seconds and ("shoal, capped", 1) in seconds:
        egress = statistics.median(each.egress_bytes for each in taken["shoal, capped", 8]) / sizes["shoal, capped"]
        ratio = seconds["shoal, capped", 8] / seconds["shoal, capped", 1]
        print(f"\nCapped, N = 8: egress {egress:.2f} times the file (goal at most 1.3), ", end="")
        print(f"last node after {ratio:.2f} times the time of one (goal at most 1.5).")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large-mib", type=int, default=1024)
    parser.add_argument("--small-mib", type=int, default=128)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--cap", type=int, default=8_000_000, help="bytes per second")
    parser.add_argument("--only", choices=["single", "capped", "uncapped"])
    parser.add_argument("--json", type=Path, help="a file for every single figure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as work:
        asyncio.run(compare(args, Path(work)))


if __name__ == "__main__":
    main()
