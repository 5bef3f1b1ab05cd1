"""`pull`: have every shard of a model or data set on a node's disk, checked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from node.background import FirstErrorGroup
from node.cli.console import SHOWN_SHARDS, bytes_progress, examples, fail, human_bytes, out, print_json
from node.config import Address
from protocol.client import Client
from protocol.commands.shards import GetManifestResult, ShardResult
from protocol.errors import UnreachableError
from protocol.manifest import Manifest, ShardEntry

EXAMPLES = examples(
    "shoal pull smol",
    "shoal pull o3://bucket/shoal/manifests/smol/ --node 127.0.0.1:7500",
    "shoal pull fineweb-edu --json | jq .folder",
)
DEFAULT_NODE = "127.0.0.1:7400"
AT_ONCE = 8
"""Shards that are fetched at a time; the node downloads 16, for all who ask."""

Node = Annotated[str, typer.Option(metavar="HOST:PORT", help="RPC address of the daemon.")]


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME|URL", help="name, name@digest, or the URL of a manifest.")],
    *,
    node: Node = DEFAULT_NODE,
    json_output: Annotated[bool, typer.Option("--json", help="Print what came as one line of JSON.")] = False,
) -> None:
    """Bring a model or data set to a node's disk.

    The node fetches each shard from its peers, or from an origin if no peer has it, and checks it. Interrupted, the
    same command goes on from there. The daemon must be running: it keeps what it got, and shares it.
    """
    try:
        manifest, results = asyncio.run(_pull(address_of(node), name))
    except UnreachableError as error:
        fail(f"{error.message} `shoal` starts one")
    except KeyboardInterrupt:
        fail("interrupted; what came is kept, and the same command goes on from there", code=130)
    folder = Path(results[0].path).parent
    if json_output:
        named = {"name": manifest.name, "kind": manifest.kind, "digest": manifest.digest}
        print_json(named | {"folder": str(folder), "shards": results})
        return
    for one, entry in zip(results[:SHOWN_SHARDS], manifest.shards, strict=False):
        line = f"  {entry.shard_id:>4}  {entry.filename}  {human_bytes(entry.size)} {_SOURCES[one.source]}"
        out.print(line, markup=False, soft_wrap=True)
    if (left := len(results) - SHOWN_SHARDS) > 0:
        out.print(f"        and {left} more")
    moved: dict[str, int] = {}
    for one in results:
        for source, count in (one.bytes_by_source or {"local": one.bytes}).items():
            moved[source] = moved.get(source, 0) + count
    shares = ", ".join(
        f"{human_bytes(count)} {_SOURCES.get(source, source)}" for source, count in moved.items() if count
    )
    out.print(f"{manifest.kind} {manifest.name}: {len(results)} shards in {folder}", markup=False, soft_wrap=True)
    out.print(f"  {shares}", markup=False, soft_wrap=True)
    out.print(f"{manifest.name}@{manifest.digest}", markup=False, soft_wrap=True)


_SOURCES = {"local": "here already", "peers": "from peers", "origin": "from an origin"}


def address_of(node: str) -> Address:
    """Read HOST:PORT, or fail."""
    try:
        return Address.parse(node)
    except ValueError as error:
        fail(f"{error}; a node prints its rpc port when it is ready", code=2)


def selector(manifest: Manifest, entry: ShardEntry) -> dict[str, Any]:
    """The parameters that name one shard, to a node that knows the manifest."""
    if manifest.kind == "file":
        return {"content_id": entry.content_id}
    return {manifest.kind: manifest.digest, "shard_id": entry.shard_id}


async def _pull(address: Address, name: str) -> tuple[Manifest, list[ShardResult]]:
    async with Client.connect(address.host, address.port) as client:
        answer = await client.call("GET_MANIFEST", {"name": name}, result_type=GetManifestResult)
        manifest = answer.signed.manifest
        slots = asyncio.Semaphore(AT_ONCE)
        with bytes_progress() as progress:
            bars = _Bars(progress, manifest)

            async def fetch(entry: ShardEntry) -> ShardResult:
                async with slots:
                    with bars.of(entry) as show:
                        return await client.call(
                            "FETCH_SHARD", selector(manifest, entry), result_type=ShardResult, on_notification=show
                        )

            async with FirstErrorGroup() as group:
                tasks = [group.create_task(fetch(entry)) for entry in manifest.shards]
        return manifest, [task.result() for task in tasks]


class _Bars:
    """One bar for all shards, and one for each that is on its way."""

    def __init__(self, progress: Progress, manifest: Manifest) -> None:
        self._progress = progress
        self._total = progress.add_task(manifest.name, total=manifest.total_bytes)

    @contextmanager
    def of(self, entry: ShardEntry) -> Iterator[Callable[[str, Mapping[str, Any]], None]]:
        """Give what takes the shard's notifications; afterwards it counts as whole."""
        bar = self._progress.add_task(f"shard {entry.shard_id}", total=entry.size)
        counted = 0

        def show(method: str, params: Mapping[str, Any]) -> None:
            nonlocal counted
            done = int(params.get("bytes_done", 0))
            label = f"shard {entry.shard_id} {params.get('phase')}"
            self._progress.update(bar, completed=done, description=label)
            self._progress.advance(self._total, max(0, done - counted))
            counted = max(counted, done)

        try:
            yield show
        finally:
            self._progress.remove_task(bar)
        self._progress.advance(self._total, entry.size - counted)
