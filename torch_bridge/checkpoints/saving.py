"""A state on its way to the origin: a snapshot, its parts as files, the parts and their manifest, the commit last."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from node.origin.interface import ObjectStore
from node.origin.layout import shard_key
from node.origin.publishing import AT_ONCE, Missing, Source, missing_at, publish
from protocol.errors import InvalidShardError, OriginCorruptError
from protocol.ids import ContentId, ShardId
from protocol.manifest import Manifest, ShardEntry, SignedManifest, sign_manifest
from protocol.signing import SigningKey
from torch_bridge.checkpoints.commit import Commit, commit_folder, encode_commit, parse_commit_key
from torch_bridge.checkpoints.parts import PART_BYTES, Part, content_id_of, pack
from torch_bridge.checkpoints.tree import FlatState, flatten
from torch_bridge.loop import loop_thread
from torch_bridge.stores import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state as it was at one moment: nothing that the training goes on with is in it."""

    run_id: str
    epoch: int
    step: int | None
    state: FlatState


@dataclass(frozen=True, slots=True)
class PartFiles:
    """A snapshot's parts on this machine's disk."""

    signed: SignedManifest
    files: Mapping[ContentId, Source]
    folder: Path


def take_snapshot(run_id: str, epoch: int, step: int | None, state: Mapping[str, Any]) -> Snapshot:
    """Copy all tensors of `state` to the CPU. Raises UnsayableStateError."""
    flat = flatten(state)
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in flat.tensors.items()}
    return Snapshot(run_id, epoch, step, replace(flat, tensors=copies))


def write_parts(snapshot: Snapshot, folder: Path, key: SigningKey, part_bytes: int = PART_BYTES) -> PartFiles:
    """Write the parts into `folder`, one in memory at a time. The model's tensors share no part with the optimizer's,
    nor with any other member of the state: one of them often stays as it was.
    """
    members: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in snapshot.state.tensors.items():
        members[name.partition("/")[0]][name] = tensor
    entries: list[ShardEntry] = []
    files: dict[ContentId, Source] = {}

    def write(filename: str, part: Part) -> None:
        path = folder / filename
        path.write_bytes(part.body)
        stat = path.stat()
        files[part.content_id] = Source(path, stat.st_size, stat.st_mtime_ns)
        number = ShardId(len(entries))
        entries.append(
            ShardEntry(
                shard_id=number, filename=filename, size=stat.st_size, content_id=part.content_id, kind="file"
            )
        )  # fmt: skip

    for member, tensors in sorted(members.items()):
        for number, part in enumerate(pack(tensors, part_bytes)):
            write(f"{member}-{number:05d}.safetensors", part)
    if not entries:  # a manifest names one file at least
        body = save({})
        write("no-tensors.safetensors", Part((), body, content_id_of(body)))
    manifest = Manifest(name=manifest_name(snapshot), kind="dataset", shards=tuple(entries))
    return PartFiles(sign_manifest(manifest, key), files, folder)


def manifest_name(snapshot: Snapshot) -> str:
    """Of the data set that the parts are, for nodes."""
    step = "" if snapshot.step is None else f"-step-{snapshot.step}"
    return f"{snapshot.run_id}/epoch-{snapshot.epoch}{step}"


def upload(
    store: Store, snapshot: Snapshot, parts: PartFiles, key: SigningKey, damaged: AbstractSet[ContentId] = frozenset()
) -> Commit:
    """Put the parts that are not there, then their manifest, then, once all of it is there, the commit.

    `damaged`: parts of which the origin is known to have something else; they are written again.

    Raises OriginError, InvalidShardError.
    """

    async def send(backing: ObjectStore) -> dict[ContentId, str]:
        manifest = parts.signed.manifest
        for part in damaged & parts.files.keys():
            await backing.delete(shard_key(part))
        # Torrent files take libtorrent to make; nodes take shards without one whole.
        missing = [Missing(one.entry, True, False) for one in await _missing(backing, manifest) if one.shard]
        await publish(backing, parts.signed, missing, parts.files, {})
        return await check_parts_there(backing, manifest)

    root_cids = store.begin(send).result()
    others = [parse_commit_key(info.key) for info in store.list(commit_folder(snapshot.run_id))]
    newest_ms = max((other.written_ms for other in others if other), default=0)
    commit = Commit(
        run_id=snapshot.run_id,
        epoch=snapshot.epoch,
        step=snapshot.step,
        written_ms=max(int(time.time() * 1000), newest_ms + 1),
        manifest=parts.signed,
        root_cids=root_cids,
        structure=snapshot.state.structure,
        publisher=key.node_id,
    )
    name, digest, body = encode_commit(commit, key, loop_thread().run(_least_bytes(store)))
    store.put(name, body, if_absent=True)
    return replace(commit, key=name, digest=digest)


async def check_parts_there(store: ObjectStore, manifest: Manifest) -> dict[ContentId, str]:
    """Look for all parts, and give Akave's root CIDs, where it has them by now.

    Raises OriginNotFoundError, OriginCorruptError where an object has another size, and other OriginErrors.
    """
    slots = asyncio.Semaphore(AT_ONCE)

    async def look(entry: ShardEntry) -> str | None:
        async with slots:
            info = await store.head(shard_key(entry.content_id))
        if info.size not in (entry.size, max(entry.size, store.min_object_bytes)):
            raise OriginCorruptError(
                f"{info.key} at {store.url} has {info.size} bytes, the part {entry.filename} has {entry.size}: delete"
                " that object, and save again",
                {"origin": store.url, "key": info.key},
            )
        return info.root_cid

    found = await asyncio.gather(*(look(entry) for entry in manifest.shards))
    return {entry.content_id: cid for entry, cid in zip(manifest.shards, found, strict=True) if cid}


async def _missing(store: ObjectStore, manifest: Manifest) -> list[Missing]:
    """What is missing, after what is not as long as the part of its name is taken away."""
    for _ in manifest.shards:
        try:
            return await missing_at(store, manifest)
        except InvalidShardError as err:
            log.warning("%s; it is written again", err)
            await store.delete(str(err.details["key"]))
    return await missing_at(store, manifest)


async def _least_bytes(store: Store) -> int:
    return store.backing.min_object_bytes
