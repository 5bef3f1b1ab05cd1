"""Copies the hidden state after a slice's last layer out of llama.cpp's evaluation callback, and stops the graph there.

The public API returns the state after the final norm only. The evaluation callback is called twice for a node of the
graph: before it computes, llama.cpp's scheduler shows every node in order and asks whether its data is wanted; for a
wanted node, it computes up to that node, shows it again, and continues only if the callback says so. The tap says no:
the norm and the output projection, which a slice that is not the last does not need, are skipped.

Slicing costs one callback for each node (about 32 a layer), so the callback is cheap: C calls a generator's `send`
directly, and the generator counts. The first graph of a shape finds the index of the wanted node by its name; later
graphs check the name at that index again, so that another tensor is never taken for it.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from node.pipeline.engine.llama import NodeCallback, library


class _NextGraphError(Exception):
    """Thrown into the counting generator: the next node is the first of a graph."""


class HiddenTap:
    """Copies node `l_out-<last layer>` of every graph into `rows`.

    Around each decode: `expect(...)`, llama_decode, `copied()`. One tap belongs to one context and one thread.
    """

    def __init__(self, last_layer: int, max_tokens: int, n_embd: int) -> None:
        self.rows: NDArray[np.float32] = np.zeros((max_tokens, n_embd), np.float32)
        """[max_tokens, n_embd]; the first n rows are those of the last decode of n tokens."""
        self.address: int = self.rows.ctypes.data
        self._wanted = f"l_out-{last_layer}".encode()
        self._row_bytes = n_embd * 4
        self._indices: dict[tuple[int, int], int] = {}
        self._shape = (0, 0)
        self._n_copied = 0
        lib = library()
        self._size_of, self._get_data = lib.ggml_nbytes, lib.ggml_backend_tensor_get
        self._counter = self._count()
        next(self._counter)
        self.callback = NodeCallback(self._counter.send)
        """For `llama_context_params.cb_eval`; must live as long as the context."""

    def expect(self, n_tokens: int, n_sequences: int) -> None:
        """Prepare for a graph of this many tokens and sequences; graphs of the same shape have the same nodes."""
        self._shape = (n_tokens, n_sequences)
        self._n_copied = 0
        # Wherever the previous graph ended: on several devices the scheduler shows nodes of later splits, too.
        self._counter.throw(_NextGraphError)

    def copied(self) -> bool:
        """Whether the last decode reached the wanted node, with the expected number of rows.

        False if the nodes have other indices than in the first graph of this shape. The index is then forgotten, and
        the same decode, done again, finds the node by its name.
        """
        if self._n_copied == 1:
            return True
        self._indices.pop(self._shape, None)
        return False

    def _count(self) -> Generator[bool, int, None]:
        """Receives the address of each node; yields whether its data is wanted, and then whether to continue."""
        name_of = library().ggml_get_name
        while True:
            try:
                node = yield False  # answers the second call for a wanted node; receives the first node of a graph
                index = self._indices.get(self._shape, 1)
                for _ in repeat(None, index - 1):
                    node = yield False
                while name_of(node) != self._wanted:
                    node = yield False
                    index += 1
                if self._copy((yield True)):
                    self._indices[self._shape] = index
            except _NextGraphError:
                continue

    def _copy(self, node: int) -> bool:
        size = self._shape[0] * self._row_bytes
        if self._size_of(node) != size:
            return False
        self._get_data(node, self.address, 0, size)
        self._n_copied += 1
        return True
