"""`verify`: every copy of a model or data set, on nodes and at origins, against its manifest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer
from rich.table import Table

from node.background import FirstErrorGroup
from node.cli.console import add_row, bytes_progress, err, examples, fail, out, print_json
from node.cli.options import ConfigFile, O3Endpoint, OriginKeyFile, S3Endpoint
from node.cli.pull import DEFAULT_NODE, Node, address_of, selector
from node.config import Address, Settings, load_settings
from node.origin.layout import is_address, layer_bytes, layer_in_torrent
from node.origin.location import OriginLocation
from node.origin.registry import OriginRegistry
from node.origin.settings import origin_settings
from protocol.client import Client
from protocol.commands.nodes import NodeEntry, NodesResult
from protocol.commands.shards import FileInfo, GetManifestResult, ListFilesResult
from protocol.commands.tasks import VerifyShardResult
from protocol.content import is_piece_layer
from protocol.errors import (
    OriginCorruptError,
    OriginError,
    OriginNotFoundError,
    ShoalError,
    UnknownNameError,
    UnreachableError,
)
from protocol.manifest import Manifest, ShardEntry, SignedManifest

EXAMPLES = examples(
    "shoal verify smol",
    "shoal verify smol --origin",
    "shoal verify fineweb-edu --at o3://bucket/shoal --json | jq '.copies[] | select(.state != \"good\")'",
)
ANSWER_S = 30.0
VERIFY_S = 3600.0
"""For a node to hash one shard."""
MAX_NODES_AT_ONCE = 8

State = Literal["good", "damaged", "missing", "unchecked"]


@dataclass(frozen=True)
class Copy:
    """One shard at one place."""

    where: str
    """host:port of a node, or an origin's URL."""
    shard_id: int
    filename: str
    state: State
    detail: str = ""

    @property
    def is_wrong(self) -> bool:
        """An origin was asked for outright; a node may be away."""
        return self.state in ("damaged", "missing") or (self.state == "unchecked" and is_address(self.where))


def verify(
    name: Annotated[str, typer.Argument(metavar="MODEL|DATASET", help="name, name@digest, or a manifest's URL.")],
    *,
    node: Node = DEFAULT_NODE,
    origin: Annotated[bool, typer.Option("--origin", help="Also at every origin that is configured or named.")] = False,
    at: Annotated[list[str] | None, typer.Option(metavar="URL", help="Also at this origin; repeatable.")] = None,
    config: ConfigFile = None,
    o3_endpoint: O3Endpoint = None,
    s3_endpoint: S3Endpoint = None,
    origin_key_file: OriginKeyFile = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print every copy as one line of JSON.")] = False,
) -> None:
    """Compare every copy with the manifest.

    Each node that has shards of it hashes them again. At an origin each shard is read whole and hashed here, which
    costs its traffic. Exit status 1 if a copy is damaged, an origin lacks a shard or does not give it, or a shard
    has no good copy; a node that does not answer is only named.
    """
    settings = load_settings(
        config=config, o3_endpoint=o3_endpoint, s3_endpoint=s3_endpoint, origin_key_file=origin_key_file
    )
    signed, copies = asyncio.run(_verify(name, address_of(node), settings, at or [], named_too=origin))
    manifest = signed.manifest
    good = {copy.shard_id for copy in copies if copy.state == "good"}
    nowhere = [entry.shard_id for entry in manifest.shards if entry.shard_id not in good]
    wrong = [copy for copy in copies if copy.is_wrong]
    if json_output:
        named = {"name": manifest.name, "kind": manifest.kind, "digest": manifest.digest}
        print_json(
            named | {"ok": not (wrong or nowhere), "without_copy": nowhere, "copies": [asdict(one) for one in copies]}
        )
    else:
        _show(manifest, copies, nowhere)
    if wrong or nowhere:
        raise typer.Exit(1)


def _show(manifest: Manifest, copies: Sequence[Copy], nowhere: Sequence[int]) -> None:
    table = Table("where", "shard", "file", "is", "", box=None)
    for copy in copies:
        add_row(table, copy.where, str(copy.shard_id), copy.filename, copy.state, copy.detail)
    out.print(table)
    counts = ", ".join(
        f"{count} {state}"
        for state in ("good", "damaged", "missing", "unchecked")
        if (count := sum(copy.state == state for copy in copies))
    )
    out.print(f"{manifest.kind} {manifest.name}: {counts or 'no copies'}", markup=False, soft_wrap=True)
    if nowhere:
        shown = ", ".join(map(str, nowhere[:20]))
        out.print(f"no good copy was found of: {shown}; publish it again", markup=False, soft_wrap=True)


async def _verify(
    name: str, address: Address, settings: Settings, at: Sequence[str], *, named_too: bool
) -> tuple[SignedManifest, list[Copy]]:
    known = origin_settings(settings, origins=at or None)
    async with OriginRegistry.open(known, trusted=[name] if is_address(name) else []) as origins:
        copies: list[Copy] = []
        try:
            async with Client.connect(address.host, address.port) as client:
                signed = await _manifest(client, origins, name)
                nodes = await client.call("NODES", result_type=NodesResult, timeout_s=ANSWER_S)
            copies += await _at_nodes(signed.manifest, nodes.nodes, address)
        except UnreachableError as error:
            if not (at or named_too):
                fail(f"{error.message} `shoal` starts one; --at URL verifies an origin alone")
            err.print(f"no node at {address.host}:{address.port}: only origins are verified", markup=False)
            signed = await _manifest(None, origins, name)
        if at or named_too:
            places = origins.locations(signed)
            if at:
                places = tuple(place for place in places if place.url in origins.urls)
            if not places:
                fail("no origin is configured, and the manifest names none: give one by --at URL", code=2)
            copies += [copy for place in places async for copy in _at_origin(place, signed.manifest)]
        return signed, copies


async def _manifest(client: Client | None, origins: OriginRegistry, name: str) -> SignedManifest:
    """As the node knows it; if there is no node, or it does not know it, as an origin does."""
    if is_address(name):
        return await origins.manifest_at(name)
    unknown: ShoalError | None = None
    if client is not None:
        try:
            answer = await client.call(
                "GET_MANIFEST", {"name": name}, result_type=GetManifestResult, timeout_s=2 * ANSWER_S
            )
        except UnknownNameError as error:
            unknown = error
        else:
            return answer.signed
    found = await origins.find_manifests(None, name)
    if not found:
        raise unknown or UnknownNameError(f"no origin knows {name!r}: {', '.join(origins.urls) or 'none was given'}")
    if len(found) > 1:
        fail(f"the origins differ in what {name!r} is: " + ", ".join(f"{name}@{one.digest[:12]}" for one in found))
    return found[0]


async def _at_nodes(manifest: Manifest, nodes: Sequence[NodeEntry], asked: Address) -> list[Copy]:
    slots = asyncio.Semaphore(MAX_NODES_AT_ONCE)

    async def look(one: NodeEntry) -> list[Copy]:
        address = asked if one.here else Address(one.host, one.rpc_port)
        async with slots:
            return [copy async for copy in _at_node(address, manifest)]

    async with FirstErrorGroup() as group:
        tasks = [group.create_task(look(one)) for one in nodes]
    return [copy for task in tasks for copy in task.result()]


async def _at_node(address: Address, manifest: Manifest) -> AsyncIterator[Copy]:
    """The copies that a node has, one after the other: they share its disk."""
    where = f"{address.host}:{address.port}"
    entries = {entry.content_id: entry for entry in manifest.shards}
    try:
        async with Client.connect(address.host, address.port) as client:
            listed = await client.call("LIST_FILES", result_type=ListFilesResult, timeout_s=ANSWER_S)
            for file in listed.files:
                entry = entries.get(file.content_id) if file.content_id else None
                if entry is not None and file.state != "downloading":
                    yield await _file_at(client, where, manifest, entry, file)
    except ShoalError as error:
        yield Copy(where, 0, "", "unchecked", error.message)


async def _file_at(client: Client, where: str, manifest: Manifest, entry: ShardEntry, file: FileInfo) -> Copy:
    def copy(state: State, detail: str = "") -> Copy:
        return Copy(where, entry.shard_id, file.filename, state, detail)

    if file.state == "invalid":
        return copy("damaged", file.error or "")
    ours = file.shard_id == entry.shard_id and manifest.name in (file.model, file.dataset)
    which = selector(manifest, entry) if ours else {"content_id": entry.content_id}
    try:
        found = await client.call(
            "EXECUTE_TASK", {"task_type": "verify_shard"} | which, result_type=VerifyShardResult, timeout_s=VERIFY_S
        )
    except ShoalError as error:
        return copy("unchecked", error.message)
    return copy("good") if found.valid else copy("damaged", f"it holds content {found.found or 'that nobody can read'}")


async def _at_origin(place: OriginLocation, manifest: Manifest) -> AsyncIterator[Copy]:
    entries = {entry.content_id: entry for entry in manifest.shards}.values()
    with bytes_progress() as bars:
        bar = bars.add_task(place.url, total=sum(entry.size for entry in entries))
        for entry in entries:
            state, detail = await _object_at(place, entry, lambda count: bars.advance(bar, count))
            yield Copy(place.url, entry.shard_id, entry.filename, state, detail)


async def _torrent_fault(place: OriginLocation, entry: ShardEntry) -> tuple[State, str] | None:
    """What is wrong with the shard's torrent file. A missing one is not wrong: shards are plain files too."""
    try:
        layer = layer_in_torrent(await place.torrent(entry), entry.content_id)
    except OriginNotFoundError:
        return None
    except OriginCorruptError as error:
        return "damaged", error.message
    except OriginError as error:
        return "unchecked", error.message
    if is_piece_layer(layer, entry.size, entry.content_id):
        return None
    found = "has other hashes" if layer else "cannot be read"
    return "damaged", f"its torrent file {found}: delete that object, and publish again"


async def _object_at(place: OriginLocation, entry: ShardEntry, on_bytes: Callable[[int], None]) -> tuple[State, str]:
    try:
        found = await place.content_id(entry, on_bytes)
        if found != entry.content_id:
            return "damaged", f"it holds content {found}: delete the object, and publish again"
    except OriginNotFoundError as error:
        return "missing", error.message
    except OriginError as error:
        return "unchecked", error.message
    if layer_bytes(entry.size) and (wrong := await _torrent_fault(place, entry)):
        return wrong
    return "good", await place.network_state(entry)
