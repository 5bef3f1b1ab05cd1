"""O3StorageReader: the newest valid index of a checkpoint, and what it names, checked."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from node.origin.layout import shard_key
from protocol.errors import InvalidParamsError, OriginCorruptError, OriginNotFoundError
from protocol.ids import ContentId
from torch_bridge.checkpoints.dcp.index import (
    InlineBytes,
    Stored,
    StoredObject,
    StoredRange,
    decode_index,
    index_folder,
    is_checkpoint_id,
    versions_in,
)
from torch_bridge.checkpoints.dcp.items import plain_value, tensor_of
from torch_bridge.checkpoints.parts import IN_FLIGHT, DamagedPartError, content_id_of, in_order
from torch_bridge.checkpoints.state import InvalidStructureError
from torch_bridge.core.store import Store

_log = logging.getLogger(__name__)


class NoCheckpointError(LookupError):
    """Raised when there is no checkpoint of that id, or no valid one."""


class O3StorageReader(StorageReader):
    """Reads the newest valid version of a checkpoint, or the one that `version` names. Bytes are compared with their
    content id before they are parsed.
    """

    def __init__(
        self, store: Store, checkpoint_id: str, *, version: str | None = None, concurrency: int = IN_FLIGHT
    ) -> None:
        """Raises InvalidParamsError for an id that not every store takes as a name."""
        self._store = store
        self._folder = index_folder(checkpoint_id)
        self._asked = version
        self._concurrency = concurrency
        self._metadata = Metadata({})
        self.checkpoint_id = checkpoint_id
        self.version: str | None = None
        """The one that was read."""

    def versions(self) -> list[str]:
        """Those that are there, valid or not, newest first."""
        return [found.version for found in versions_in(self._store.list(self._folder), self._folder)]

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self._folder = index_folder(os.fspath(checkpoint_id))
            self.checkpoint_id = os.fspath(checkpoint_id)
        self.version = None

    # torch asks a second time, for an index of this rank alone, if it finds a parameter called `kwargs`.
    def read_metadata(self, *args: Any, **_: Any) -> Metadata:
        """The index of the version that was asked for, or of the newest valid one.

        Raises:
            NoCheckpointError: there is none, or no valid one.
            DamagedPartError, InvalidStructureError: the version that was asked for is damaged.
        """
        found = versions_in(self._store.list(self._folder), self._folder)
        if self._asked is not None:
            found = [key for key in found if key.version == self._asked]
        for key in found:
            try:
                body = self._store.get(key.key)
                metadata = decode_index(body, key.content_id)
            except (DamagedPartError, InvalidStructureError, OriginCorruptError, OriginNotFoundError) as error:
                if self._asked is not None:
                    raise
                _log.warning("%s%s is damaged, an older one is looked for: %s", self._folder, key.version, error)
                continue
            self.version = key.version
            return metadata
        asked = f", version {self._asked}," if self._asked else ""
        raise NoCheckpointError(
            f"checkpoint {self.checkpoint_id!r}{asked} at {self._store.url}: {len(found)} versions under "
            f"{self._folder}, none of them valid; give another id or version, or another bucket"
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **_: Any) -> None:
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return replace(plan, storage_data=self.version)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Raises InvalidParamsError if a commit between their looks made the ranks choose differently."""
        chosen = {plan.storage_data for plan in plans}
        if len(chosen) > 1:
            raise InvalidParamsError(
                f"the ranks chose different versions of {self.checkpoint_id!r}: {', '.join(sorted(map(str, chosen)))}; "
                "load again, or give version= the one that is meant"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank needs, each object once."""
        wanted: dict[InlineBytes | StoredObject, list[tuple[ReadItem, Stored]]] = {}
        for item in plan.items:
            at: Stored = self._metadata.storage_data[item.storage_index]
            whole = StoredObject(at.content_id, at.size) if isinstance(at, StoredRange) else at
            wanted.setdefault(whole, []).append((item, at))
        with ThreadPoolExecutor(self._concurrency, "dcp-read") as pool:
            read = in_order(pool, lambda whole: self._read(whole, wanted[whole][0][0]), wanted, self._concurrency)
            for whole, body in read:
                for item, at in wanted[whole]:
                    part = body[at.offset : at.offset + at.length] if isinstance(at, StoredRange) else body
                    self._load(item, part, planner, inline=isinstance(at, InlineBytes))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, at: InlineBytes | StoredObject, item: ReadItem) -> bytes:
        if isinstance(at, InlineBytes):
            return at.body
        key = shard_key(ContentId(at.content_id))
        advice = f"{self.checkpoint_id!r} version {self.version} cannot be loaded; ask for an older one with version="
        try:
            body = self._store.get_range(key, 0, at.size)
        except (OriginNotFoundError, OriginCorruptError) as error:
            raise DamagedPartError(
                f"{item.storage_index.fqn!r} should be in {key} ({at.size} bytes): {error}. {advice}"
            ) from error
        if (found := content_id_of(body)) != at.content_id:
            raise DamagedPartError(
                f"{item.storage_index.fqn!r} should be in {key}, and the bytes there are {found}: damaged. {advice}"
            )
        return body

    def _load(self, item: ReadItem, body: bytes, planner: LoadPlanner, *, inline: bool) -> None:
        fqn = item.storage_index.fqn
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, plain_value(fqn, body))
            return
        entry = self._metadata.state_dict_metadata[fqn]
        if not isinstance(entry, TensorStorageMetadata):
            raise InvalidStructureError(f"{fqn!r} is a plain value in the checkpoint, and a tensor was asked for")
        (sizes,) = {chunk.sizes for chunk in entry.chunks if MetadataIndex(fqn, chunk.offsets) == item.storage_index}
        tensor = tensor_of(fqn, body, entry.properties.dtype, sizes, inline=inline)
        for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            tensor = tensor.narrow(dim, start, length)
        target = planner.resolve_tensor(item).detach()
        if target.shape != tensor.shape:
            raise InvalidStructureError(
                f"{fqn!r}: {tuple(tensor.shape)} was read, and there is room for {tuple(target.shape)}"
            )
        target.copy_(tensor)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_checkpoint_id(os.fspath(checkpoint_id))
