"""Samples tokens with llama.cpp's samplers; the randomness follows from (seed, position) alone.

So after a failure another node samples the tokens that the first one would have sampled.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from node.pipeline.engine.llama import RANDOM_SEED, ChainParams, TokenDataArray, library
from protocol.commands.tasks import Sampling
from protocol.errors import EngineError

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""`llama_token_data`."""
GREEDY_BELOW = 1e-5
"""Temperatures below it: a division could overflow a float, and would choose the largest logit anyway."""
_MAX_CHAINS = 64
_MASK = (1 << 64) - 1


class Sampler:
    """The buffers and chains of samplers. For one thread."""

    def __init__(self) -> None:
        self._chains: OrderedDict[tuple[float, int, float, float], int] = OrderedDict()
        self._candidates = np.zeros(0, _CANDIDATE)
        self._ids = np.zeros(0, np.int32)

    def close(self) -> None:
        for chain in self._chains.values():
            library().llama_sampler_free(chain)
        self._chains.clear()

    def sample(self, logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
        """The token id sampled from `logits` [n_vocab] for `position` of the sequence.

        Temperature 0 takes the largest logit, the lowest id among equals. Raises EngineError if the largest logit is
        not finite: an earlier stage or the file is broken, and any token would be wrong.
        """
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):  # argmax finds NaN first
            raise EngineError(
                f"the model's largest logit at position {position} is {logits[best]}: it cannot be sampled from"
            )
        if sampling.temperature < GREEDY_BELOW:
            return best
        lib = library()
        candidates = self._fill(logits)
        array = TokenDataArray(candidates.ctypes.data, len(candidates), -1, False)
        dist = lib.llama_sampler_init_dist(sampler_seed(sampling.seed, position))
        try:
            lib.llama_sampler_apply(self._chain(sampling), ctypes.byref(array))
            lib.llama_sampler_apply(dist, ctypes.byref(array))
            if not 0 <= array.selected < array.size:
                raise EngineError(f"llama.cpp's samplers chose none of {len(logits)} tokens with {sampling}")
            # A sampler may have moved the candidates to its own buffer.
            return ctypes.c_int32.from_address(array.data + array.selected * _CANDIDATE.itemsize).value
        finally:
            lib.llama_sampler_free(dist)

    def _fill(self, logits: NDArray[np.float32]) -> NDArray[np.void]:
        if len(self._candidates) != len(logits):
            self._candidates = np.zeros(len(logits), _CANDIDATE)
            self._ids = np.arange(len(logits), dtype=np.int32)
        self._candidates["id"] = self._ids  # the samplers sorted them in the last call
        self._candidates["logit"] = logits
        return self._candidates

    def _chain(self, sampling: Sampling) -> int:
        """Top-k, top-p, min-p, then temperature: llama.cpp's order. None of them has state."""
        key = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        chain = self._chains.get(key)
        if chain is not None:
            self._chains.move_to_end(key)
            return chain
        lib = library()
        chain = int(lib.llama_sampler_chain_init(ChainParams(True)))
        if sampling.top_k > 0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(sampling.min_p, 1))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(sampling.temperature))
        self._chains[key] = chain
        if len(self._chains) > _MAX_CHAINS:
            lib.llama_sampler_free(self._chains.popitem(last=False)[1])
        return chain


def sampler_seed(seed: int, position: int) -> int:
    """The 32-bit seed of llama.cpp's sampler for one position of a session with a seed of 64 bits.

    Two rounds of SplitMix64 (Steele, Lea, Flood 2014), the second over the first result and the position, so that
    neighbouring seeds and positions are unrelated. llama.cpp reserves one value to mean "a random seed".
    """
    mixed = _splitmix64(_splitmix64(seed & _MASK) ^ (position & _MASK)) >> 32
    return mixed if mixed != RANDOM_SEED else 0


def _splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
