"""`files`, `unpin`, `evict`: what lies on a running node's disk, and what may leave it."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer
from rich.table import Table

from node.cli.console import add_row, examples, fail, human_bytes, out, print_json
from node.cli.options import Json
from node.cli.pull import DEFAULT_NODE, Node, address_of, selector
from protocol.commands.shards import (
    FileInfo,
    GetManifestResult,
    ListFilesResult,
    ShardResult,
    UnpinResult,
)
from protocol.errors import ShardNotFoundError, ShoalError, UnreachableError
from protocol.manifest import Manifest
from protocol.sync_client import SyncClient

ANSWER_S = 30.0
"""For what a node answers from what it knows."""
EVICT_S = 600.0
"""For one shard: a large file on a slow disk, and others that evict."""
FILES_EXAMPLES = examples("shoal files", "shoal files --node 127.0.0.1:7500 --json | jq '.files[] | select(.pinned)'")
UNPIN_EXAMPLES = examples("shoal unpin fineweb-edu", "shoal unpin fineweb-edu --json | jq .evictable_bytes")
EVICT_EXAMPLES = examples("shoal evict fineweb-edu", "shoal evict smol --node 127.0.0.1:7500")

Name = Annotated[str, typer.Argument(metavar="NAME|URL", help="name, name@digest, or the URL of a manifest.")]


def files(*, node: Node = DEFAULT_NODE, json_output: Json = False) -> None:
    """List the shard files of a node, and which of them are pinned.

    A pinned file stays until `unpin` or `evict`: all do but those that were fetched for a training run alone.
    """
    with _connected(node) as client:
        found = client.call("LIST_FILES", {}, result_type=ListFilesResult, timeout_s=ANSWER_S)
    if json_output:
        print_json(found)
        return
    table = Table("file", "size", "state", "leases", "", box=None)
    for one in found.files:
        state = f"{one.state}: {one.error}" if one.error else one.state
        add_row(table, one.filename, human_bytes(one.size), state, str(one.leases), "pinned" if one.pinned else "")
    out.print(table)
    pinned = [one.size for one in found.files if one.pinned]
    out.print(
        f"{len(found.files)} files, {human_bytes(sum(one.size for one in found.files))}; "
        f"{len(pinned)} pinned, {human_bytes(sum(pinned))}"
    )


def unpin(name: Name, *, node: Node = DEFAULT_NODE, json_output: Json = False) -> None:
    """End the pin of what was pulled, published or put there.

    A training run that is past a shard of it deletes the file then; `evict` deletes at once. `pull` pins again.
    """
    with _connected(node) as client:
        manifest = _manifest(client, name)
        which: dict[str, Any] = {manifest.kind: manifest.digest}
        if manifest.kind == "file":
            which = selector(manifest, manifest.shards[0])
        found = client.call("UNPIN", which, result_type=UnpinResult, timeout_s=ANSWER_S)
    if json_output:
        print_json(found)
        return
    out.print(
        f"{manifest.kind} {manifest.name}: {_shards(len(found.shard_ids))} unpinned, {human_bytes(found.bytes)}; "
        f"{human_bytes(found.evictable_bytes)} may be evicted now",
        markup=False,
        soft_wrap=True,
    )


def evict(name: Name, *, node: Node = DEFAULT_NODE, json_output: Json = False) -> None:
    """Delete a model or data set from a node's disk, pinned or not.

    What a stage has loaded or a training run reads stays, and is an error. If no other node and no origin has it, these
    are its last bytes.
    """
    evicted: list[ShardResult] = []
    kept: list[ShoalError] = []
    with _connected(node) as client:
        manifest = _manifest(client, name)
        here = client.call("LIST_FILES", {}, result_type=ListFilesResult, timeout_s=ANSWER_S).files
        found = Counter(map(_shard_of, here))
        for entry in manifest.shards:
            if not found[(manifest.name, entry.shard_id, entry.content_id)]:
                continue
            try:
                which = selector(manifest, entry)
                evicted.append(client.call("EVICT_SHARD", which, result_type=ShardResult, timeout_s=EVICT_S))
            except UnreachableError:
                raise
            except ShardNotFoundError:
                continue  # a training run was past it meanwhile
            except ShoalError as error:
                kept.append(error)
    if not evicted and not kept:
        fail(
            ShardNotFoundError(
                f"no shard of {manifest.kind} {manifest.name} is on this node; `shoal files` shows what is"
            )
        )
    if json_output:
        print_json({"name": manifest.name, "digest": manifest.digest, "evicted": evicted})
    else:
        size = human_bytes(sum(one.bytes for one in evicted))
        line = f"{manifest.kind} {manifest.name}: {_shards(len(evicted))} deleted, {size}"
        out.print(line, markup=False, soft_wrap=True)
    if kept:
        more = f" ({_shards(len(kept))} stay)" if len(kept) > 1 else ""
        fail(type(kept[0])(kept[0].message + more))


def _shards(count: int) -> str:
    return "1 shard" if count == 1 else f"{count} shards"


def _shard_of(file: FileInfo) -> tuple[str | None, int | None, str | None]:
    name = file.model or file.dataset or (file.filename.rpartition("/")[2] if file.content_id else None)
    return name, file.shard_id, file.content_id


def _connected(node: str) -> SyncClient:
    address = address_of(node)
    try:
        return SyncClient(address.host, address.port)
    except UnreachableError as error:
        fail(f"{error.message} `shoal` starts one")


def _manifest(client: SyncClient, name: str) -> Manifest:
    answer = client.call("GET_MANIFEST", {"name": name}, result_type=GetManifestResult, timeout_s=ANSWER_S)
    return answer.signed.manifest
