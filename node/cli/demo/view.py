"""What a person sees of a demo."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from node.cli.console import human_bytes, out
from node.cli.demo.nodes import RunningNode
from protocol.commands.shards import ListFilesResult, ShardResult
from protocol.commands.tasks import InferenceResult


def step(number: int, text: str) -> None:
    """A heading."""
    out.print(f"\n[bold cyan]{number}[/] [bold]{text}[/]")


def note(text: str) -> None:
    """A line below a heading."""
    out.print(f"  {text}", markup=False)


def show_files(found: ListFilesResult) -> None:
    """The answer of LIST_FILES."""
    table = Table("file", "size", "state", "model", "shard", "content id", box=None, padding=(0, 2))
    for file in found.files:
        table.add_row(
            file.filename,
            human_bytes(file.size),
            file.state,
            file.model or "",
            "" if file.shard_id is None else str(file.shard_id),
            (file.content_id or "")[:16],
        )
    out.print(table)


def show_summary(
    nodes: Sequence[RunningNode],
    loads: Sequence[ShardResult],
    result: InferenceResult,
    reference_tokens_per_s: float,
) -> None:
    """Where each shard came from and how fast, and the figures of the generation."""
    names = {node.node_id: node.name for node in nodes}
    layers = {shard: stage.layers for stage in result.stages for shard in stage.shards}
    table = Table("node", "shard", "layers", "size", "came from", "MB/s", box=None, padding=(0, 2))
    for node, load in zip(nodes, loads, strict=True):
        moved = sum(load.bytes_by_source.values())
        start, end = layers.get(load.shard_id, (0, 0))
        table.add_row(
            node.name,
            str(load.shard_id),
            f"[{start}, {end})",
            human_bytes(load.bytes),
            load.source,
            f"{moved / max(load.seconds, 1e-9) / 1e6:.1f}" if moved else "-",
        )
    out.print(table)
    timings = result.timings
    out.print(
        f"\n  pipeline            {' -> '.join(names.get(stage.node, stage.node[:8]) for stage in result.stages)}\n"
        f"  prompt + answer     {result.usage.prompt_tokens} + {result.usage.completion_tokens} tokens\n"
        f"  time to first token {timings.time_to_first_token_s * 1000:.0f} ms\n"
        f"  speed               {timings.tokens_per_s:.1f} tokens/s "
        f"(one process, one thread: {reference_tokens_per_s:.1f})",
        markup=False,
    )
