"""`call`, `nodes`, `status`, `generate`: one request to a running node each."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import typer
from rich.markup import escape
from rich.progress import Progress as RichProgress
from rich.progress import TaskID
from rich.table import Table

from node.cli.console import add_row, bytes_progress, err, examples, fail, human_bytes, out, print_json
from node.cli.options import Json
from node.config import Address
from protocol.commands.nodes import NodesResult, StatusResult
from protocol.commands.tasks import InferenceResult
from protocol.errors import ShoalError
from protocol.sync_client import SyncClient

ANSWER_S = 30.0
"""For what a node answers from what it knows."""
R = TypeVar("R")
Target = Annotated[str, typer.Argument(metavar="HOST:PORT", help="RPC address of a node.")]

CALL_EXAMPLES = examples(
    "shoal call 127.0.0.1:7400 LIST_FILES",
    """shoal call 127.0.0.1:7400 LOAD_SHARD '{"model": "smol", "shard_id": 1}'""",
)
NODES_EXAMPLES = examples("shoal nodes 127.0.0.1:7400")
STATUS_EXAMPLES = examples("shoal status 127.0.0.1:7400", "shoal status 127.0.0.1:7400 --json | jq .stages")
GENERATE_EXAMPLES = examples(
    'shoal generate 127.0.0.1:7400 --model smol --prompt "Why is the sky blue?"',
    "shoal generate 127.0.0.1:7400 --prompt - --max-tokens 500 < question.txt",
)


def call(
    node: Target,
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="docs/rpc.md lists them.")],
    parameters: Annotated[str, typer.Argument(metavar="JSON", help="Its parameters, an object.")] = "{}",
    *,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="For the answer; then it is cancelled.")] = 3600.0,
) -> None:
    """Send one command, print one JSON envelope.

    The envelope has command, request_id, status ("ok" or "error"), and result or error. Notifications (PROGRESS,
    TASK_OUTPUT) go to stderr, a line of JSON each. Exit status 1 if the answer is an error.
    """
    command = command.upper().replace("-", "_")
    try:
        given = json.loads(parameters)
    except json.JSONDecodeError as error:
        fail(f"the parameters are not JSON: {error}; write them as '{{\"shard_id\": 0}}'", code=2)
    if not isinstance(given, dict):
        fail(f"the parameters must be a JSON object, not {type(given).__name__}", code=2)
    request_id = uuid.uuid4().hex
    envelope: dict[str, Any] = {"command": command, "request_id": request_id}

    def show(method: str, params: Mapping[str, Any]) -> None:
        print_json({"notification": method, **params}, sys.stderr)

    try:
        result = _call(node, command, given, object, request_id=request_id, timeout_s=timeout, on_notification=show)
    except ShoalError as error:
        print_json(envelope | {"status": "error", "error": error.to_wire()})
        sys.exit(1)
    print_json(envelope | {"status": "ok", "result": result})


def nodes(node: Target, *, json_output: Json = False) -> None:
    """List the nodes of the cluster that a node knows."""
    found = _call(node, "NODES", {}, NodesResult, timeout_s=ANSWER_S)
    if json_output:
        print_json(found)
        return
    table = Table("node", "address", "dht", "bittorrent", "memory free", "cores", box=None)
    for one in found.nodes:
        mark = " (asked)" if one.here else ""
        add_row(
            table,
            one.node_id[:12] + mark,
            f"{one.host}:{one.rpc_port}",
            str(one.dht_port),
            str(one.bt_port),
            human_bytes(one.memory_available_bytes),
            str(one.cores),
        )
    out.print(table)


def status(node: Target, *, json_output: Json = False) -> None:
    """Show what a node is doing."""
    found = _call(node, "STATUS", {}, StatusResult, timeout_s=ANSWER_S)
    if json_output:
        print_json(found)
        return
    grid = Table.grid(padding=(0, 2))
    add_row(grid, "node", found.node_id)
    add_row(grid, "cluster", found.cluster)
    add_row(grid, "up", f"{found.uptime_s:.0f} s, Shoal {found.versions.get('shoal', '?')}")
    memory = found.memory
    add_row(
        grid,
        "memory",
        f"{human_bytes(memory.get('available_bytes', 0))} free of {human_bytes(memory.get('total_bytes', 0))}, "
        f"the daemon has {human_bytes(memory.get('process_bytes', 0))}",
    )
    add_row(grid, "engine", f"threads {found.threads} a process")
    swarm = found.swarm
    add_row(
        grid,
        "swarm",
        f"{swarm.torrents} torrents, {swarm.peers} peers, up {human_bytes(swarm.uploaded_bytes)}, "
        f"down {human_bytes(swarm.downloaded_bytes)}",
    )
    add_row(grid, "dht", f"{found.dht.nodes} nodes, {found.dht.records} records")
    origin = found.origin
    for url in origin.urls:
        add_row(grid, "origin", url)
    if origin.urls or origin.requests:
        add_row(
            grid,
            "from origins",
            f"{human_bytes(origin.downloaded_bytes)} in {origin.requests} requests, {origin.errors} failed",
        )
    for stage in found.stages:
        add_row(
            grid,
            "stage",
            f"{stage.model} shards {', '.join(map(str, stage.shards))}: {stage.sessions} sessions, "
            f"{human_bytes(stage.memory_bytes)}, process {stage.pid}",
        )
    for one in found.downloads:
        share = 100 * one.bytes_done / max(1, one.bytes_total)
        add_row(
            grid, "download", f"{one.filename} {share:.0f}% at {human_bytes(one.rate_bytes_s)}/s from {one.peers} peers"
        )
    out.print(grid)


def generate(
    node: Target,
    *,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name, or name@digest. Default: the cluster's only one.")
    ] = None,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="A message to a chat model; '-' reads stdin.")],
    raw: Annotated[bool, typer.Option("--raw", help="The prompt goes in as it is, without a chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Of the answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, metavar="T", help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, metavar="P", help="Draw from the likeliest that make up this share, above 0.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed draws the same tokens.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON result at the end, nothing streamed.")] = False,
) -> None:
    """Generate text through a pipeline of the cluster.

    The text streams to stdout, a line of figures goes to stderr. The node plans the pipeline, and has shards fetched
    and loaded if they are not.
    """
    if top_p <= 0:
        fail("--top-p 0 leaves no token to draw; give a share above 0, or --temperature 0 for the likeliest", code=2)
    text = sys.stdin.read() if prompt == "-" else prompt
    parameters: dict[str, Any] = {
        "task_type": "ai_inference",
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stream": not json_output,
    }
    parameters |= {"prompt": text} if raw else {"messages": [{"role": "user", "content": text}]}

    loads = _Loads()

    def show(method: str, params: Mapping[str, Any]) -> None:
        if method == "TASK_OUTPUT":
            loads.stop()
            sys.stdout.write(str(params.get("text", "")))
            sys.stdout.flush()
        elif method == "PROGRESS":
            loads.show(params)

    try:
        result = _call(node, "EXECUTE_TASK", parameters, InferenceResult, timeout_s=None, on_notification=show)
    finally:
        loads.stop()
    if json_output:
        print_json(result)
        return
    sys.stdout.write("\n")
    timings = result.timings
    err.print(
        f"[dim]{result.usage.prompt_tokens} + {result.usage.completion_tokens} tokens, first after "
        f"{timings.time_to_first_token_s:.2f} s, {timings.tokens_per_s:.1f} tokens/s, "
        f"{len(result.stages)} stages, ended by {result.finish_reason}[/]"
    )


class _Loads:
    """Bars on stderr for the shards that have to be loaded first; nothing if none has to be."""

    def __init__(self) -> None:
        self._bars: RichProgress | None = None
        self._shards: dict[int, TaskID] = {}

    def show(self, progress: Mapping[str, Any]) -> None:
        if self._bars is None:
            self._bars = bytes_progress()
            self._bars.start()
        shard_id = progress.get("shard_id", 0)
        if shard_id not in self._shards:
            self._shards[shard_id] = self._bars.add_task("")
        label = escape(f"shard {shard_id} {progress.get('phase')}")
        done, total = progress.get("bytes_done"), progress.get("bytes_total")
        self._bars.update(self._shards[shard_id], description=label, completed=done, total=total)

    def stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._shards.clear()


def _call(
    node: str,
    command: str,
    parameters: dict[str, Any],
    result_type: type[R],
    *,
    timeout_s: float | None,
    request_id: str | None = None,
    on_notification: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> R:
    try:
        address = Address.parse(node)
    except ValueError as error:
        fail(f"{error}; a node prints its rpc port when it is ready", code=2)
    with SyncClient(address.host, address.port) as client:
        return client.call(
            command,
            parameters,
            result_type=result_type,
            request_id=request_id,
            timeout_s=timeout_s,
            on_notification=on_notification,
        )
