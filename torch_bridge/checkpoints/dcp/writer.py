"""O3StorageWriter: what torch.distributed.checkpoint saves, as objects named by content, and one index at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from node.origin.layout import shard_key
from protocol.errors import InvalidParamsError, OriginExistsError, OriginNotFoundError
from protocol.ids import ContentId
from torch_bridge.checkpoints.dcp.index import (
    INLINE_BYTES,
    MAX_INDEX_BYTES,
    InlineBytes,
    StoredObject,
    StoredRange,
    encode_index,
    index_folder,
    is_checkpoint_id,
    versions_in,
)
from torch_bridge.checkpoints.dcp.items import body_of
from torch_bridge.checkpoints.parts import IN_FLIGHT, content_id_of, in_order
from torch_bridge.core.store import Store

PACKED_BELOW = 64 << 10
PACK_BYTES = 8 << 20


class O3StorageWriter(StorageWriter):
    """Writes one checkpoint a `dcp.save`. `checkpoint_id` names a run, or one checkpoint: each save adds a new version
    below it. `checkpoint_id=` of `dcp.save` has precedence.
    """

    def __init__(self, store: Store, checkpoint_id: str, *, concurrency: int = IN_FLIGHT) -> None:
        """Raises InvalidParamsError for an id that not every store takes as a name."""
        self._store = store
        self._folder = index_folder(checkpoint_id)
        self._concurrency = concurrency
        self.checkpoint_id = checkpoint_id
        self.version: str | None = None
        """Of the last save, on the coordinator: `O3StorageReader(..., version=)` reads this one and no other."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self._folder = index_folder(os.fspath(checkpoint_id))
            self.checkpoint_id = os.fspath(checkpoint_id)
        self.version = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises InvalidParamsError with use_collectives=False: each rank would commit its part as the whole."""
        if not kwargs.get("use_collectives", True):
            raise InvalidParamsError(
                "use_collectives=False makes no checkpoint that can be committed in one step: save with collectives"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Put this rank's items, those that the store does not have; small ones together."""
        with ThreadPoolExecutor(self._concurrency, "dcp-write") as pool:
            made = in_order(pool, lambda item: body_of(item, planner), plan.items, self._concurrency)
            kept = in_order(pool, self._keep, _packed(made), self._concurrency)
            results = [result for _, of_object in kept for result in of_object]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit: write the index, under a name that was never used."""
        stored = {result.index: result.storage_data for of_rank in results for result in of_rank}
        body = encode_index(metadata, stored)
        if len(body) > MAX_INDEX_BYTES:
            raise InvalidParamsError(
                f"the index takes {len(body)} bytes, and {MAX_INDEX_BYTES} at most: save fewer names"
            )
        before = max(
            (found.written_ms for found in versions_in(self._store.list(self._folder), self._folder)), default=0
        )
        stamp = max(time.time_ns() // 1_000_000, before + 1)
        version = f"{stamp:013d}-{content_id_of(body)}"
        self._store.put(f"{self._folder}{version}.json", body, if_absent=True)
        self.version = version

    def _keep(self, packed: _Packed) -> list[WriteResult]:
        if all(len(body) <= INLINE_BYTES for _, body in packed):
            return [WriteResult(item.index, len(body), InlineBytes(body)) for item, body in packed]
        whole = b"".join(body for _, body in packed)
        kept = StoredObject(content_id_of(whole), len(whole))
        key = shard_key(ContentId(kept.content_id))
        try:
            there = self._store.head(key).size
        except OriginNotFoundError:
            there = None
        if there is None or there < len(whole):
            with suppress(OriginExistsError):  # another rank has the same tensor, and was first
                self._store.put(key, whole, if_absent=there is None)
        if len(packed) == 1:
            return [WriteResult(packed[0][0].index, len(whole), kept)]
        starts = accumulate((len(body) for _, body in packed), initial=0)
        return [
            WriteResult(item.index, len(body), StoredRange(kept.content_id, kept.size, start, len(body)))
            for (item, body), start in zip(packed, starts, strict=False)
        ]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_checkpoint_id(os.fspath(checkpoint_id))


_Packed = tuple[tuple[WriteItem, bytes], ...]
"""Items of one object, one after the other."""


def _packed(made: Iterable[tuple[WriteItem, bytes]]) -> Iterator[_Packed]:
    """Small items together, in their order: an origin takes as long for a small object as for a megabyte."""
    small: list[tuple[WriteItem, bytes]] = []
    size = 0
    for item, body in made:
        if len(body) <= INLINE_BYTES or len(body) > PACKED_BELOW:
            yield ((item, body),)
            continue
        small.append((item, body))
        size += len(body)
        if size >= PACK_BYTES:
            yield tuple(small)
            small, size = [], 0
    if small:
        yield tuple(small)
