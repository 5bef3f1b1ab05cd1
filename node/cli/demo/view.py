"""What a person sees of a demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from node.cli.console import add_row, human_bytes, out
from node.cli.demo.nodes import RunningNode
from protocol.commands.shards import ListFilesResult, ShardResult
from protocol.commands.tasks import InferenceResult


@dataclass(frozen=True)
class DemoLoad:
    """One LOAD_SHARD of the demo."""

    result: ShardResult
    transfer_s: float
    """While bytes moved: finding providers before and loading afterwards left out."""


def step(number: int, text: str) -> None:
    """A heading."""
    out.print(f"\n[bold cyan]{number}[/] [bold]{text}[/]")


def note(text: str) -> None:
    """A line below a heading."""
    out.print(f"  {text}", markup=False)


def show_files(found: ListFilesResult) -> None:
    """The answer of LIST_FILES."""
    table = Table("file", "size", "state", "content id", box=None, padding=(0, 2))
    for file in found.files:
        add_row(table, Path(file.filename).name, human_bytes(file.size), file.state, (file.content_id or "")[:16])
    out.print(table)


def show_source(load: DemoLoad) -> None:
    """Where one shard came from."""
    shard = load.result
    moved = sum(shard.bytes_by_source.values())
    rate = f" at {moved / load.transfer_s / 1e6:.1f} MB/s" if load.transfer_s else ""
    note(f"source: {shard.source}, {human_bytes(moved)}{rate}, ready after {shard.seconds:.2f} s")


def show_summary(
    nodes: Sequence[RunningNode],
    loads: Sequence[DemoLoad],
    result: InferenceResult,
    reference_tokens_per_s: float,
) -> None:
    """Where each shard came from and how fast, and the figures of the generation."""
    names = {node.node_id: node.name for node in nodes}
    layers = {shard: stage.layers for stage in result.stages for shard in stage.shards}
    table = Table("node", "shard", "layers", "size", "came from", "MB/s", "ready after", box=None, padding=(0, 2))
    for node, load in zip(nodes, loads, strict=True):
        shard = load.result
        moved = sum(shard.bytes_by_source.values())
        start, end = layers.get(shard.shard_id, (0, 0))
        add_row(
            table,
            node.name,
            str(shard.shard_id),
            f"[{start}, {end})",
            human_bytes(shard.bytes),
            shard.source,
            f"{moved / load.transfer_s / 1e6:.1f}" if moved and load.transfer_s else "-",
            f"{shard.seconds:.2f} s",
        )
    out.print(table)
    timings = result.timings
    out.print(
        f"\n  pipeline            {' -> '.join(names.get(stage.node, stage.node[:8]) for stage in result.stages)}\n"
        f"  prompt + answer     {result.usage.prompt_tokens} + {result.usage.completion_tokens} tokens\n"
        f"  time to first token {timings.time_to_first_token_s * 1000:.0f} ms\n"
        f"  speed               {timings.tokens_per_s:.1f} tokens/s "
        f"(one process on its own: {reference_tokens_per_s:.1f})",
        markup=False,
    )
