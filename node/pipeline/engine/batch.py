"""The arrays of a `llama_batch`, made once and filled for every decode; all shards of a stage share them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Slot:
    """The next tokens of one sequence, in a `forward`."""

    sequence: int
    """From `open_sequence`."""
    position: int
    """Of the first token; the tokens before it are in the KV cache."""
    values: NDArray[np.int32] | NDArray[np.float32]
    """int32 [n] token ids for a model's first shard, float32 [n, n_embd] hidden states for the others."""
    logits_for_last: bool = True
    """On the last shard: whether to return the logits after the last token."""


class TokenBatch:
    """Positions, sequences and output marks of up to `capacity` tokens."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.n = 0
        self.n_sequences = 0
        self.starts: list[tuple[int, int]] = []
        """(sequence, first position) of every slot."""
        self.tokens: NDArray[np.int32] = np.zeros(capacity, np.int32)
        self._pos = np.zeros(capacity, np.int32)
        self._sequences = np.zeros(capacity, np.int32)
        self._outputs = np.zeros(capacity, np.int8)
        self._all = np.ones(capacity, np.int8)
        self._ones = np.ones(capacity, np.int32)
        # seq_id is an array of pointers, one a token, each to that token's only sequence id.
        first = self._sequences.ctypes.data
        self._pointers = (first + 4 * np.arange(capacity)).astype(np.uintp)
        self._steps = np.arange(capacity, dtype=np.int32)
        self.token_address = self.tokens.ctypes.data
        self.pos_address = self._pos.ctypes.data
        self.n_seq_id_address = self._ones.ctypes.data
        self.seq_id_address = self._pointers.ctypes.data
        self.outputs_address = self._outputs.ctypes.data
        self.all_address = self._all.ctypes.data

    def begin(self) -> None:
        self.n = self.n_sequences = 0
        self.starts.clear()

    def add_token(self, sequence: int, position: int, *, wanted: bool) -> None:
        """Add one token of a sequence; the caller writes its id to `tokens`, or its hidden state elsewhere."""
        n = self.n
        self._pos[n] = position
        self._sequences[n] = sequence
        self._outputs[n] = wanted
        self._end_slot(sequence, position, 1)

    def add_tokens(self, sequence: int, position: int, count: int, *, wanted: bool) -> None:
        """Add `count` tokens from `position` on; `wanted` marks the last one as an output."""
        n, end = self.n, self.n + count
        self._pos[n:end] = self._steps[:count] + position
        self._sequences[n:end] = sequence
        self._outputs[n:end] = 0
        self._outputs[end - 1] = wanted
        self._end_slot(sequence, position, count)

    def _end_slot(self, sequence: int, position: int, count: int) -> None:
        self.n += count
        self.n_sequences += 1
        self.starts.append((sequence, position))
