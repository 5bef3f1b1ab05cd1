"""Round trips and MB/s of the transport between two processes, beside bare tensor_iroh in the same run.

    python -m scripts.bench.transport [--rounds 5] [--trips 300] [--total 64MiB in bytes]

A trip is what a generated token costs: a frame of 576 float32 (2.3 KB) one way, one int32 back. Bare tensor_iroh
answers each tensor by a small one and keeps at most eight unanswered, which is its best here; it neither orders, nor
bounds, nor checks. The two take turns; medians over rounds are compared. Both processes live on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from tensor_iroh import PyTensorData, PyTensorNode

from node.transport import IrohEndpoint

KEY = bytes(range(32))
HIDDEN = np.zeros((1, 576), np.float32)
SIZES = {"64 KiB": 64 << 10, "1 MiB": 1 << 20, "16 MiB": 16 << 20}
UNANSWERED = 8


async def answer(report: int, ticket: str, bare_ticket: str) -> None:
    """The other process: answers each frame of either transport by an int32."""
    node = PyTensorNode()
    await node.start()
    async with IrohEndpoint.open() as endpoint:
        inbox = endpoint.open_inbox("there", KEY)
        outlet = endpoint.open_outlet(ticket, "back", KEY)
        os.write(report, json.dumps([endpoint.ticket, await node.get_node_addr()]).encode())
        os.close(report)

        async def bare() -> None:
            small = PyTensorData(bytes(4), [1], "int32", False)
            while (await node.wait_for_tensor())[0] != "end":
                await node.send_tensor(bare_ticket, "back", small)

        async def ours() -> None:
            small = np.zeros(1, np.int32)
            while (frame := await inbox.receive()).sequence >= 0:
                await outlet.send(frame.sequence, small)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(bare())
            tasks.create_task(ours())


class Bare:
    """tensor_iroh as it is."""

    def __init__(self, node: Any, ticket: str) -> None:
        self.node, self.ticket = node, ticket

    async def trip(self) -> None:
        body = PyTensorData(HIDDEN.tobytes(), [1, 576], "float32", False)
        await self.node.send_tensor(self.ticket, "there", body)
        _, data = await self.node.wait_for_tensor()
        np.frombuffer(data.as_bytes(), np.int32)

    async def stream(self, tensor: np.ndarray[Any, Any], count: int) -> None:
        flat = tensor.view(np.uint8)
        unanswered = 0
        sends = []
        for _ in range(count):
            sends.append(self.node.send_tensor(self.ticket, "t", PyTensorData(flat, [len(tensor)], "float32", False)))
            unanswered += 1
            while unanswered >= UNANSWERED:
                await self.node.wait_for_tensor()
                unanswered -= 1
        for _ in range(unanswered):
            await self.node.wait_for_tensor()
        await asyncio.gather(*sends)


class Ours:
    """The same through node.transport."""

    def __init__(self, inbox: Any, outlet: Any) -> None:
        self.inbox, self.outlet = inbox, outlet

    async def trip(self) -> None:
        await self.outlet.send(0, HIDDEN)
        await self.inbox.receive(10)

    async def stream(self, tensor: np.ndarray[Any, Any], count: int) -> None:
        async def answers() -> None:
            for _ in range(count):
                await self.inbox.receive(60)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(answers())
            for number in range(count):
                await self.outlet.send(number, tensor, 60)


@contextlib.asynccontextmanager
async def transports() -> AsyncIterator[dict[str, Bare | Ours]]:
    """Both transports, connected to one child process."""
    node = PyTensorNode()
    await node.start()
    async with IrohEndpoint.open() as endpoint:
        inbox = endpoint.open_inbox("back", KEY)
        read, write = os.pipe()
        arguments = [sys.executable, "-m", "scripts.bench.transport", "--answer", str(write)]
        arguments += [endpoint.ticket, await node.get_node_addr()]
        child = subprocess.Popen(arguments, pass_fds=[write], stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        os.close(write)
        try:
            ticket, bare_ticket = json.loads(await asyncio.to_thread(os.read, read, 65536))
            outlet = endpoint.open_outlet(ticket, "there", KEY)
            yield {"bare": Bare(node, bare_ticket), "ours": Ours(inbox, outlet)}
            await node.send_tensor(bare_ticket, "end", PyTensorData(b"", [0], "float32", False))
            await outlet.send(-1, np.zeros(1, np.int32))
            await asyncio.to_thread(child.wait, 10)
            print(endpoint.stats().counters)
        finally:
            os.close(read)
            child.kill()
            child.wait()


async def main(rounds: int, trips: int, total: int) -> None:
    """Measure and print."""
    async with transports() as both:
        times: dict[str, list[float]] = {name: [] for name in both}
        rates: dict[tuple[str, str], list[float]] = {}
        for transport in both.values():
            for _ in range(50):
                await transport.trip()
        for _ in range(rounds):
            for name, transport in both.items():
                for _ in range(trips):
                    start = time.perf_counter()
                    await transport.trip()
                    times[name].append(time.perf_counter() - start)
        for label, size in SIZES.items():
            tensor = np.zeros(size // 4, np.float32)
            count = max(total // size, 2)
            for _ in range(rounds):
                for name, transport in both.items():
                    start = time.perf_counter()
                    await transport.stream(tensor, count)
                    rates.setdefault((label, name), []).append(count * size / (time.perf_counter() - start) / 1e6)
        print(f"{'':14}{'bare':>10}{'ours':>10}{'ratio':>8}")
        for label, quantile in (("trip p50, ms", 0.5), ("trip p90, ms", 0.9)):
            bare, ours = (sorted(times[name])[int(len(times[name]) * quantile)] * 1e3 for name in ("bare", "ours"))
            print(f"{label:14}{bare:10.3f}{ours:10.3f}{ours / bare:8.2f}")
        for label in SIZES:
            bare, ours = (statistics.median(rates[label, name]) for name in ("bare", "ours"))
            print(f"{label + ', MB/s':14}{bare:10.0f}{ours:10.0f}{ours / bare:8.2f}")


if __name__ == "__main__":
    # tensor_iroh writes its warnings to fd 1: the table goes to a copy of it.
    table = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = table
    if sys.argv[1:2] == ["--answer"]:
        asyncio.run(answer(int(sys.argv[2]), *sys.argv[3:5]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--trips", type=int, default=300)
        parser.add_argument("--total", type=int, default=64 << 20, help="bytes per stream")
        chosen = parser.parse_args()
        asyncio.run(main(chosen.rounds, chosen.trips, chosen.total))
