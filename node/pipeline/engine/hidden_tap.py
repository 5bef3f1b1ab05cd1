"""Takes the hidden state after a slice's last layer out of llama.cpp while it computes, and stops it there.

The public API gives out the state after the final norm only, so this hangs on the evaluation callback: before
it computes, the scheduler shows every node of the graph in order and asks whether someone wants its data; when
one is wanted, it computes up to that node, shows it again, and goes on only if told so. Being told no, it skips
the norm and the output projection, which a slice that is not the last does not need.

A callback a node (about 32 a layer) is all that slicing costs, so it is cheap: a generator's `send` is called
straight from C, and it counts. The place of the wanted node was found by name in the first graph of that shape;
at the counted place the name is checked again, so that no other tensor is ever taken for it.
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

    Used around each decode: `expect(...)`, llama_decode, `taken()`. One tap belongs to one context and one thread.
    """

    def __init__(self, last_layer: int, max_tokens: int, n_embd: int) -> None:
        self.rows: NDArray[np.float32] = np.zeros((max_tokens, n_embd), np.float32)
        """[max_tokens, n_embd]; the first n rows are those of the last decode of n tokens."""
        self.address: int = self.rows.ctypes.data
        self._wanted = f"l_out-{last_layer}".encode()
        self._row_bytes = n_embd * 4
        self._places: dict[tuple[int, int], int] = {}
        self._shape = (0, 0)
        self._n_taken = 0
        lib = library()
        self._size_of, self._get_data = lib.ggml_nbytes, lib.ggml_backend_tensor_get
        self._counter = self._count()
        next(self._counter)
        self.callback = NodeCallback(self._counter.send)
        """For `llama_context_params.cb_eval`; must live as long as the context."""

    def expect(self, n_tokens: int, n_sequences: int) -> None:
        """The next graph is for this many tokens of this many sequences; only graphs of one such shape are alike."""
        self._shape = (n_tokens, n_sequences)
        self._n_taken = 0
        # Wherever the graph before ended: on several devices the scheduler shows nodes of later splits, too.
        self._counter.throw(_NextGraphError)

    def taken(self) -> bool:
        """Whether the decode that just ended passed the wanted node, with the expected number of rows.

        False after a graph whose nodes stood elsewhere than in the first of its shape: what was counted is
        forgotten, and the same decode, done again, goes by names.
        """
        if self._n_taken == 1:
            return True
        self._places.pop(self._shape, None)
        return False

    def _count(self) -> Generator[bool, int, None]:
        """Receives the address of each node; yields whether its data is wanted and, after that, whether to go on."""
        name_of = library().ggml_get_name
        while True:
            try:
                node = yield False  # answers the second showing of a wanted node; receives a graph's first
                place = self._places.get(self._shape, 1)
                for _ in repeat(None, place - 1):
                    node = yield False
                while name_of(node) != self._wanted:
                    node = yield False
                    place += 1
                if self._copy((yield True)):
                    self._places[self._shape] = place
            except _NextGraphError:
                continue

    def _copy(self, node: int) -> bool:
        size = self._shape[0] * self._row_bytes
        if self._size_of(node) != size:
            return False
        self._get_data(node, self.address, 0, size)
        self._n_taken += 1
        return True
