"""Writing a checkpoint: a snapshot of the state, its parts straight out of memory, their manifest, the commit last."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from node.files import FileLock
from node.origin.interface import ObjectStore
from node.origin.layout import shard_key
from node.origin.publishing import AT_ONCE, publish
from protocol.errors import OriginCorruptError, OriginExistsError, OriginNotFoundError
from protocol.ids import ContentId, ShardId
from protocol.manifest import Manifest, ShardEntry, sign_manifest
from protocol.signing import SigningKey
from torch_bridge.checkpoints.commit import (
    Commit,
    InvalidCommitError,
    commit_folder,
    decode_commit,
    encode_commit,
    parse_commit_key,
)
from torch_bridge.checkpoints.parts import PART_BYTES, DamagedPartError, Part, in_order, laid_out, pack, unpack
from torch_bridge.checkpoints.state import FlatState, InvalidStructureError, flatten, rebuild
from torch_bridge.core.folders import writing_to
from torch_bridge.core.loop_thread import loop_thread
from torch_bridge.core.store import Store

log = logging.getLogger(__name__)

SENT_AT_ONCE = 3
"""Parts that are hashed, looked for or sent at a time: so many copies of a part are in memory beside the snapshot."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of a state at one moment; it shares no memory with the training."""

    run_id: str
    epoch: int
    step: int | None
    state: FlatState


def take_snapshot(
    run_id: str,
    epoch: int,
    step: int | None,
    state: Mapping[str, Any],
    spare: Mapping[str, torch.Tensor] | None = None,
) -> Snapshot:
    """Copy all tensors of `state` to the CPU. `spare`: those of a snapshot that is no longer needed, whose memory is
    overwritten: memory that is new to the process costs several times the copy. Raises UnsayableStateError.
    """
    flat = flatten(state)
    copies = {name: _copied(tensor, (spare or {}).get(name)) for name, tensor in flat.tensors.items()}
    return Snapshot(run_id, epoch, step, replace(flat, tensors=copies))


def _copied(tensor: torch.Tensor, spare: torch.Tensor | None) -> torch.Tensor:
    if spare is not None and (spare.shape, spare.dtype) == (tensor.shape, tensor.dtype):
        return spare.copy_(tensor.detach())
    # Contiguous, so that its memory can be sent as it is.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def parts_of(snapshot: Snapshot, part_bytes: int = PART_BYTES) -> dict[str, Part]:
    """The parts, by file name. The model's tensors share no part with the optimizer's, nor with any other member of the
    state: one of them often stays as it was.
    """
    members: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in snapshot.state.tensors.items():
        members[name.partition("/")[0]][name] = tensor
    parts = {
        f"{member}-{number:05d}.safetensors": part
        for member, tensors in sorted(members.items())
        for number, part in enumerate(pack(tensors, part_bytes))
    }
    return parts or {"no-tensors.safetensors": laid_out({})}  # a manifest names one file at least


def write_files(parts: Mapping[str, Part], folder: Path) -> None:
    """The parts as files. Raises OSError."""
    for filename, part in parts.items():
        with (folder / filename).open("wb") as out:
            out.writelines(part.pieces)


def manifest_name(snapshot: Snapshot) -> str:
    """Of the data set that the parts are, for nodes."""
    step = "" if snapshot.step is None else f"-step-{snapshot.step}"
    return f"{snapshot.run_id}/epoch-{snapshot.epoch}{step}"


def upload(
    store: Store,
    snapshot: Snapshot,
    parts: Mapping[str, Part],
    key: SigningKey,
    damaged: AbstractSet[ContentId] = frozenset(),
) -> Commit:
    """Upload the missing parts, read them back, then write their manifest, and last the commit.

    `damaged`: parts that the origin is known to have with other bytes; they are written again. Each object is retried
    by itself: an outage costs the objects under way, however long the save took before.

    Raises OriginError; OriginCorruptError if the origin gives back other bytes than it was given; UnreadableCommitError
    if the commit would not read back as this state.
    """
    entries = _send_parts(store, parts, damaged)
    signed = sign_manifest(Manifest(name=manifest_name(snapshot), kind="dataset", shards=entries), key)
    # Making torrent files needs libtorrent; nodes download shards without one as a whole.
    store.begin(lambda backing: publish(backing, signed, [], {}, {})).result()
    root_cids = store.begin(lambda backing: check_parts_there(backing, signed.manifest)).result()
    others = [parse_commit_key(info.key) for info in store.list(commit_folder(snapshot.run_id))]
    newest_ms = max((other.written_ms for other in others if other), default=0)
    commit = Commit(
        run_id=snapshot.run_id,
        epoch=snapshot.epoch,
        step=snapshot.step,
        written_ms=max(int(time.time() * 1000), newest_ms + 1),
        manifest=signed,
        root_cids=root_cids,
        structure=snapshot.state.structure,
        publisher=key.node_id,
    )
    name, digest, body = encode_commit(commit, key, _Limits.of(store).min_object_bytes)
    _expect_readable(name, body, commit, parts)
    store.put(name, body, if_absent=True)
    return replace(commit, key=name, digest=digest)


class UnreadableCommitError(ValueError):
    """Raised when a commit that is about to be written could not be loaded. Nothing was committed."""


def _expect_readable(name: str, body: bytes, commit: Commit, parts: Mapping[str, Part]) -> None:
    """Read the commit as `load_checkpoint` will. Raises UnreadableCommitError."""
    named = parse_commit_key(name)
    tensors = {tensor: torch.empty(0) for part in parts.values() for tensor in part.names}
    try:
        assert named is not None
        read = decode_commit(body, named, commit.run_id, frozenset({commit.publisher}))
        rebuild(read.structure, tensors)
        same = read.structure == commit.structure and read.manifest.manifest == commit.manifest.manifest
    except (InvalidCommitError, InvalidStructureError) as err:
        raise UnreadableCommitError(f"the checkpoint {name} was not committed: it could not be loaded: {err}") from err
    if not same:
        raise UnreadableCommitError(f"the checkpoint {name} was not committed: it would be loaded as another state")


class _Limits(NamedTuple):
    """What a store requires of an object."""

    min_object_bytes: int
    writes_once: bool

    @classmethod
    def of(cls, store: Store) -> _Limits:
        async def ask() -> _Limits:
            return cls(store.backing.min_object_bytes, store.backing.writes_once)

        return loop_thread().run(ask())


def _send_parts(store: Store, parts: Mapping[str, Part], damaged: AbstractSet[ContentId]) -> tuple[ShardEntry, ...]:
    """Each part is hashed once, and copied only if the origin does not have it."""
    limits = _Limits.of(store)
    begun: dict[ContentId, str] = {}

    def send(filename: str) -> ShardEntry:
        part = parts[filename]
        if begun.setdefault(part.content_id, filename) == filename:
            _send(store, part, limits, is_damaged=part.content_id in damaged)
        return ShardEntry(
            shard_id=ShardId(numbers[filename]),
            filename=filename,
            size=part.size,
            content_id=part.content_id,
            kind="file",
        )

    numbers = {filename: number for number, filename in enumerate(parts)}
    with ThreadPoolExecutor(SENT_AT_ONCE, thread_name_prefix="checkpoint-part") as pool:
        return tuple(entry for _, entry in in_order(pool, send, parts, SENT_AT_ONCE))


def _send(store: Store, part: Part, limits: _Limits, *, is_damaged: bool) -> None:
    key = shard_key(part.content_id)
    if is_damaged:
        store.delete(key)
    elif _is_there(store, key, part, limits):
        return
    try:
        store.put(key, part.body.ljust(limits.min_object_bytes, b"\0"), if_absent=limits.writes_once)
    except OriginExistsError:  # another saver wrote the same content a moment ago
        if not _is_there(store, key, part, limits):
            raise
    _read_back(store, key, part)


def _read_back(store: Store, key: str, part: Part) -> None:
    """Raises OriginCorruptError, after the object was deleted, if the origin has other bytes than it was given."""
    try:
        unpack(store.get_range(key, 0, part.size), part.content_id)
    except (DamagedPartError, SafetensorError) as err:
        store.delete(key)
        raise OriginCorruptError(
            f"{store.url} gave back other bytes of {key} than it was given, and the checkpoint was not committed: "
            f"save again, and check that store's disk ({err})",
            {"origin": store.url, "key": key},
        ) from err


def _is_there(store: Store, key: str, part: Part, limits: _Limits) -> bool:
    """Whether the origin has the part; an object of its name with another length is deleted."""
    try:
        size = store.head(key).size
    except OriginNotFoundError:
        return False
    if size in (part.size, max(part.size, limits.min_object_bytes)):
        return True
    log.warning("%s at %s has %d bytes, the part has %d; it is written again", key, store.url, size, part.size)
    store.delete(key)
    return False


async def check_parts_there(store: ObjectStore, manifest: Manifest) -> dict[ContentId, str]:
    """Check that all parts exist. Returns Akave's root CIDs, if it has them by now.

    Raises OriginNotFoundError, OriginCorruptError if an object has another size, and other OriginErrors.
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


_PREFIX = "shoal-checkpoint-"
_LOCK = "lock"
_PARTS = "parts"


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """An empty folder under `parent`, deleted at the end.

    Raises OSError, InvalidParamsError for one that this user may not write.
    """
    with writing_to(parent, "cache_dir"), _one_at_a_time:
        parent.mkdir(parents=True, exist_ok=True)
        _clear_left_behind(parent)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = FileLock(folder / _LOCK)
        lock.try_acquire()
    try:
        parts = folder / _PARTS
        parts.mkdir()
        yield parts
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _clear_left_behind(parent: Path) -> None:
    """Delete the folders that no process holds. One without a lock is being made at this moment, or is empty."""
    for folder in parent.glob(f"{_PREFIX}*"):
        lock = FileLock(folder / _LOCK)
        try:
            if not (folder / _LOCK).exists() or not lock.try_acquire():
                continue
        except OSError:
            continue  # another user's
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


_one_at_a_time = threading.Lock()
