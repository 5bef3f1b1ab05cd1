"""The state of the random number generators that a training run draws from, without pickle.

Python's `random`, numpy's global generator where numpy is loaded, torch's on the CPU and on every CUDA device. A
`torch.Generator` or `numpy.random.Generator` of one's own is not in it: put its state into `extra`.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def rng_state() -> dict[str, Any]:
    """As `tree.flatten` takes it; all of it is numbers and bytes, no tensor."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": _bytes_of(torch.get_rng_state())}
    if "numpy" in sys.modules:
        import numpy as np

        kind, words, position, has_gauss, gauss = np.random.get_state()
        words_le = np.asarray(words, dtype="<u4").tobytes()
        state["numpy"] = (str(kind), words_le, int(position), int(has_gauss), float(gauss))
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = [_bytes_of(one) for one in torch.cuda.get_rng_state_all()]
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back. What is in `state` and not on this machine (CUDA devices) is left out.

    Raises ValueError, TypeError or RuntimeError where a state is not one of its generator.
    """
    if "python" in state:
        random.setstate(state["python"])
    if "torch" in state:
        torch.set_rng_state(_tensor_of(state["torch"]))
    if "numpy" in state:
        import numpy as np

        kind, words, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((kind, np.frombuffer(words, dtype="<u4"), position, has_gauss, gauss))
    if "cuda" in state and torch.cuda.is_available():
        for device, one in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(_tensor_of(one), device)


def _bytes_of(state: torch.Tensor) -> bytes:
    return bytes(state.cpu().numpy().tobytes())


def _tensor_of(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
