"""llama.cpp's RPC backend as a benchmark's peer: two `ggml-rpc-server`s, a core each, driven by `llama-bench`."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S = 10.0
BENCH_S = 300.0


@dataclass(frozen=True)
class LlamaRpc:
    """Two servers that wait for `measure`."""

    bench: Path
    model: Path
    cores: list[int]
    tokens: int
    ports: list[int]

    @classmethod
    async def start(
        cls,
        stack: AsyncExitStack,
        server: Path | None,
        bench: Path | None,
        model: Path,
        cores: list[int],
        tokens: int,
    ) -> LlamaRpc | None:
        """Start the servers, if there are programs to start."""
        if server is None or bench is None:
            return None
        ports = [_free_port() for _ in cores]
        for core, port in zip(cores, ports, strict=True):
            process = await _pinned(
                core, str(server), "--host", "127.0.0.1", "--port", str(port), "--threads", "1", keep_output=False
            )
            stack.push_async_callback(_end, process)
            await _accepts(port)
        return cls(bench, model, cores, tokens, ports)

    async def measure(self) -> dict[str, float]:
        """Tokens/s of decoding: alone on one core, and over the two servers."""
        servers = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return {
            "llama": await self._run("-ngl", "0"),
            "llama_rpc": await self._run("-ngl", "99", "--rpc", servers),
        }

    async def _run(self, *arguments: str) -> float:
        command = [str(self.bench), "-m", str(self.model), "-p", "0", "-n", str(self.tokens), "-r", "1", "-t", "1"]
        process = await _pinned(self.cores[0], *command, "-o", "json", *arguments, keep_output=True)
        try:
            output, _ = await asyncio.wait_for(process.communicate(), BENCH_S)
        finally:
            await _end(process)
        results: list[dict[str, Any]] = json.loads(output)
        return float(results[-1]["avg_ts"])


async def _pinned(core: int, *command: str, keep_output: bool) -> asyncio.subprocess.Process:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if keep_output else asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
    finally:
        os.sched_setaffinity(0, before)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


async def _accepts(port: int) -> None:
    async with asyncio.timeout(START_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                await writer.wait_closed()
                return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
