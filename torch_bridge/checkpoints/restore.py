"""Reading a checkpoint back: which commit counts, and its parts, from peers first, each checked by its content id."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from node.origin.layout import shard_key
from protocol.commands.shards import ShardResult
from protocol.errors import NoSourceError, OriginCorruptError, OriginNotFoundError, ShardNotFoundError, ShoalError
from protocol.ids import ContentId, NodeId
from protocol.manifest import ShardEntry
from protocol.sync_client import SyncClient
from torch_bridge.checkpoints.commit import (
    MAX_COMMIT_BYTES,
    Commit,
    CommitKey,
    InvalidCommitError,
    commit_folder,
    decode_commit,
    parse_commit_key,
)
from torch_bridge.checkpoints.parts import DamagedPartError, in_order, unpack
from torch_bridge.checkpoints.state import InvalidStructureError, rebuild
from torch_bridge.checkpoints.upload import check_parts_there
from torch_bridge.core.store import Store

log = logging.getLogger(__name__)

DAMAGE = (OriginNotFoundError, OriginCorruptError, DamagedPartError, InvalidStructureError, SafetensorError)
"""Errors that say that a checkpoint is damaged; an origin that does not answer says nothing about that."""

READ_AT_ONCE = 3
"""Parts that are read, checked and unpacked at a time: so many are in memory twice."""
_PART_S = 300.0
"""How long a node may take for one part."""
_NODE_FAILURES = 3
"""After so many parts that the node does not have, it is not asked for more of a checkpoint."""


class CheckpointNotFoundError(LookupError):
    """Raised when a run has no valid checkpoint, or none of the epoch that was asked for, or none that is complete."""


def commits(store: Store, run_id: str, trusted: frozenset[NodeId], epoch: int | None = None) -> Iterator[Commit]:
    """The valid commits of a run, newest first; an invalid one is left out, with a line in the log."""
    listed = store.list(commit_folder(run_id))
    named: list[CommitKey] = []
    for info in listed:
        key = parse_commit_key(info.key)
        if key is None or info.size > MAX_COMMIT_BYTES:
            log.warning("%s at %s is not a commit by its name and size; it is ignored", info.key, store.url)
        elif epoch in (None, key.epoch):
            named.append(key)
    for key in sorted(named, reverse=True):
        try:
            yield decode_commit(store.get(key.key), key, run_id, trusted)
        except (InvalidCommitError, OriginNotFoundError, OriginCorruptError) as err:
            log.warning("%s at %s is ignored: %s", key.key, store.url, err)


def missing_part(store: Store, commit: Commit) -> str:
    """Why a commit's parts are not all at the origin; empty if they are. Their bytes are not read.

    Raises OriginError if the origin does not say.
    """
    try:
        store.begin(lambda backing: check_parts_there(backing, commit.manifest.manifest)).result()
    except (OriginNotFoundError, OriginCorruptError) as err:
        return str(err)
    return ""


def read_state(store: Store, commit: Commit, node: str | None, damaged: set[ContentId]) -> Any:
    """The state of a checkpoint. Parts that the origin has wrong are added to `damaged`.

    Raises one of DAMAGE, or OriginError if the origin does not answer.
    """
    peers = _NodeParts(node, commit) if node else None

    def read(entry: ShardEntry) -> dict[str, torch.Tensor]:
        found = peers.read(entry) if peers else None
        return _from_origin(store, entry, damaged) if found is None else found

    tensors: dict[str, torch.Tensor] = {}
    try:
        # A node is asked for one part after the other: it fetches from many peers at once.
        with ThreadPoolExecutor(1 if peers else READ_AT_ONCE, thread_name_prefix="checkpoint-part") as pool:
            for _, found in in_order(pool, read, commit.manifest.manifest.shards, READ_AT_ONCE):
                tensors |= found
    finally:
        if peers:
            peers.close()
    return rebuild(commit.structure, tensors)


def _from_origin(store: Store, entry: ShardEntry, damaged: set[ContentId]) -> dict[str, torch.Tensor]:
    try:
        return unpack(store.get_range(shard_key(entry.content_id), 0, entry.size), entry.content_id)
    except (DamagedPartError, OriginCorruptError):
        damaged.add(entry.content_id)
        raise


class _NodeParts:
    """Parts of one checkpoint through this machine's node."""

    def __init__(self, address: str, commit: Commit) -> None:
        manifest = commit.manifest
        self._address, self._dataset = address, f"{manifest.manifest.name}@{manifest.digest}"
        self._client: SyncClient | None = None
        self._failed = 0

    def read(self, entry: ShardEntry) -> dict[str, torch.Tensor] | None:
        """None if the node does not have it, or has it wrong: then the origin is asked."""
        if self._failed >= _NODE_FAILURES:
            return None
        try:
            if self._client is None:
                host, _, port = self._address.rpartition(":")
                self._client = SyncClient(host.strip("[]"), int(port))
            asked = {"dataset": self._dataset, "shard_id": entry.shard_id}
            found = self._client.call("FETCH_SHARD", asked, result_type=ShardResult, timeout_s=_PART_S)
            return unpack(Path(found.path).read_bytes(), entry.content_id)
        except (ShoalError, OSError, *DAMAGE) as err:
            log.warning(
                "%s does not come through the node %s, the origin is asked: %s", entry.filename, self._address, err
            )
            known = isinstance(err, (NoSourceError, ShardNotFoundError, OSError, *DAMAGE))
            self._failed += 1 if known else _NODE_FAILURES
            return None

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
