"""Tokens that need no training: one a byte of UTF-8, and one that begins a document."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BOS = 256
VOCABULARY = 257


def tokenise(texts: list[str]) -> list[NDArray[np.uint8]]:
    """The tokens of each text, without BOS."""
    return [np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8) for text in texts]


def text_of(tokens: list[int]) -> str:
    """The text again; what is not UTF-8 is marked, BOS left out."""
    return bytes(token for token in tokens if token != BOS).decode("utf-8", "replace")
