"""Runs the layers of loaded shards with llama.cpp. Synchronous, for one thread; an engine process has one."""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from node.formats.gguf import read_gguf
from node.formats.hyperparameters import model_sizes
from node.pipeline.engine.batch import Slot, TokenBatch
from node.pipeline.engine.llama import library
from node.pipeline.engine.loaded_shard import LoadedShard
from node.pipeline.engine.memory import check_memory
from node.pipeline.engine.sampling import Sampler
from node.pipeline.engine.settings import EngineSettings
from node.pipeline.engine.shard import LlamaShard
from node.pipeline.engine.vocabulary import Vocabulary
from protocol.commands.tasks import Sampling
from protocol.errors import (
    BusyError,
    ContextOverflowError,
    EngineError,
    InvalidParamsError,
    InvalidShardError,
    ShardNotLoadedError,
)

_TOKEN = np.dtype(np.int32)
_STATE = np.dtype(np.float32)


class Engine:
    """Loaded shards of one model, and the KV caches of its sequences: one sequence for each session.

    A call that raises leaves the engine usable; the caller closes the sequences that it named, since some shards may
    have cached the tokens and others not. A file that makes llama.cpp abort ends the process.
    """

    def __init__(self, settings: EngineSettings) -> None:
        """Raises UnsupportedPlatformError if the library cannot be used, EngineError if the CPUs cannot be pinned."""
        self.settings = settings
        if settings.threads_pinned_cpus is not None:
            try:
                os.sched_setaffinity(0, settings.threads_pinned_cpus)
            except (OSError, AttributeError) as err:
                raise EngineError(f"cannot pin this process to CPUs {settings.threads_pinned_cpus}: {err}") from None
        library()
        self._shards: dict[int, LlamaShard] = {}
        self._vocabularies: dict[int, Vocabulary] = {}
        self._sampler = Sampler()
        self._free = list(range(settings.max_sessions))
        self._open: set[int] = set()
        self._tokens = TokenBatch(settings.batch_capacity)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for shard_id in list(self._shards):
            self.unload(shard_id)
        self._sampler.close()

    def load(self, shard_id: int, path: Path) -> LoadedShard:
        """Load a GGUF: a slice with `shoal.*` metadata, or a whole model, which is first and last shard in one.

        Takes as long as reading the file. Raises InvalidShardError for a file that llama.cpp cannot load,
        InsufficientMemoryError, EngineError.
        """
        if shard_id in self._shards:
            raise EngineError(f"shard {shard_id} is loaded already ({self._shards[shard_id].name})")
        try:
            memory_bytes = check_memory(path.name, model_sizes(read_gguf(path)), self.settings)
        except OSError as err:
            raise InvalidShardError(f"cannot read {path.name}: {err}") from None
        shard = LlamaShard(path, self.settings, memory_bytes)
        others = [other.info.n_embd for other in self._shards.values()]
        if others and others[0] != shard.info.n_embd:
            shard.close()
            raise EngineError(f"{path.name} is of another model: {shard.info.n_embd} wide, the others {others[0]}")
        self._shards[shard_id] = shard
        return shard.info

    def unload(self, shard_id: int) -> None:
        """Free a shard, and the KV caches in it. Sequences stay open."""
        shard = self._shard(shard_id)
        vocabulary = self._vocabularies.pop(shard_id, None)
        if vocabulary is not None:
            vocabulary.close()
        del self._shards[shard_id]
        shard.close()

    def loaded(self) -> dict[int, LoadedShard]:
        return {shard_id: shard.info for shard_id, shard in self._shards.items()}

    def vocabulary(self, shard_id: int) -> Vocabulary:
        """The tokenizer in a first or last shard. Raises EngineError for a shard in the middle, which has none."""
        found = self._vocabularies.get(shard_id)
        if found is None:
            found = self._vocabularies[shard_id] = Vocabulary(self._shard(shard_id).model)
        return found

    def open_sequence(self) -> int:
        """The lowest free sequence id: neighbours are decoded in one batch. Raises BusyError if none is free."""
        if not self._free:
            raise BusyError(f"all {self.settings.max_sessions} sessions of this stage are in use; try again later")
        sequence = heapq.heappop(self._free)
        self._open.add(sequence)
        return sequence

    def close_sequence(self, sequence: int) -> None:
        """Free its KV cache in all loaded shards. Closing a sequence that is not open does nothing."""
        if sequence not in self._open:
            return
        self._open.remove(sequence)
        for shard in self._shards.values():
            shard.forget(sequence)
        heapq.heappush(self._free, sequence)

    def forward(self, shard_ids: Sequence[int], slots: Sequence[Slot]) -> list[NDArray[np.float32]]:
        """Decode every slot's tokens with the shards, one shard after the other.

        Returns for each slot, in order: float32 [n, n_embd] after the last of `shard_ids`; if that is the model's last
        shard, float32 [n_vocab] for the slot's last token (empty if the slot asks for no logits). A slot has at most
        `settings.batch_capacity` tokens. Slots with equally many tokens whose sequences are neighbours are decoded in
        one batch, up to that capacity.

        The bits depend on the shape of the batch: a session that must be reproduced is decoded alone. Raises
        InvalidParamsError, ContextOverflowError, ShardNotLoadedError, EngineError.
        """
        shards = [self._shard(shard_id) for shard_id in shard_ids]
        if not shards or not slots:
            raise InvalidParamsError(
                f"forward needs at least one shard and one slot, it was given {len(shards)} and {len(slots)}"
            )
        for before, after in itertools.pairwise(shards):
            if before.info.end_layer != after.info.start_layer:
                raise InvalidParamsError(
                    f"{before.name} ends at layer {before.info.end_layer}, {after.name} starts at layer "
                    f"{after.info.start_layer}: a stage runs neighbouring shards"
                )
        for slot in slots:
            self._check(slot, shards[0])
        if len(slots) == 1:
            return self._decode(shards, slots)
        found: dict[int, NDArray[np.float32]] = {}
        order = sorted(range(len(slots)), key=lambda index: slots[index].sequence)
        for run in self._batches(order, slots):
            found.update(zip(run, self._decode(shards, [slots[index] for index in run]), strict=True))
        return [found[index] for index in range(len(slots))]

    def sample(self, logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
        """Draw the token for `position` of a session from `logits` [n_vocab]; see node.pipeline.engine.sampling."""
        return self._sampler.sample(logits, sampling, position)

    def _decode(self, shards: list[LlamaShard], slots: Sequence[Slot]) -> list[NDArray[np.float32]]:
        first, last = shards[0], shards[-1]
        tokens = self._tokens
        tokens.begin()
        target = tokens.tokens if first.info.is_first else first.incoming
        for slot in slots:
            n = len(slot.values)
            start = tokens.n
            target[start : start + n] = slot.values
            if n == 1:
                tokens.add_token(slot.sequence, slot.position, wanted=slot.logits_for_last)
            else:
                tokens.add_tokens(slot.sequence, slot.position, n, wanted=slot.logits_for_last)
        address = first.incoming_address
        for shard in shards:
            shard.decode(tokens, address)
            if shard.tap is not None:
                address = shard.tap.address
        out: list[NDArray[np.float32]] = []
        end = 0
        for slot in slots:
            start, end = end, end + len(slot.values)
            if last.tap is not None:
                out.append(last.tap.rows[start:end].copy())
            else:
                out.append(last.logits(end - 1) if slot.logits_for_last else np.empty(0, np.float32))
        return out

    def _batches(self, order: list[int], slots: Sequence[Slot]) -> list[list[int]]:
        """Indices of slots that llama.cpp decodes in one graph: neighbouring sequences with equally many tokens."""
        batches: list[list[int]] = []
        total = 0
        for index in order:
            slot = slots[index]
            n = len(slot.values)
            if batches:
                before = slots[batches[-1][-1]]
                if slot.sequence == before.sequence:
                    raise InvalidParamsError(f"sequence {slot.sequence} is given twice in one forward")
                joins = slot.sequence == before.sequence + 1 and n == len(before.values)
                if joins and total + n <= self._tokens.capacity:
                    batches[-1].append(index)
                    total += n
                    continue
            batches.append([index])
            total = n
        return batches

    def _check(self, slot: Slot, first: LlamaShard) -> None:
        values = slot.values
        n = len(values)
        dtype, shape = (_TOKEN, (n,)) if first.info.is_first else (_STATE, (n, first.info.n_embd))
        if values.dtype != dtype or values.shape != shape or not 1 <= n <= self._tokens.capacity:
            raise InvalidParamsError(
                f"{first.name} takes {dtype} of shape {shape}, at most {self._tokens.capacity} long; "
                f"given {values.dtype} of shape {values.shape}"
            )
        if slot.sequence not in self._open:
            raise InvalidParamsError(f"sequence {slot.sequence} is not open")
        if slot.position + n > self.settings.ctx_size:
            raise ContextOverflowError(
                f"position {slot.position + n - 1} is beyond the context of {self.settings.ctx_size} tokens"
            )

    def _shard(self, shard_id: int) -> LlamaShard:
        try:
            return self._shards[shard_id]
        except KeyError:
            raise ShardNotLoadedError(
                f"shard {shard_id} is not loaded in this engine; loaded: {sorted(self._shards) or 'none'}"
            ) from None
