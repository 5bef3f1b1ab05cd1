"""How much memory a shard will take, from its GGUF header alone, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import psutil

from node.formats.gguf import GgufFile, read_gguf
from node.pipeline.settings import EngineSettings
from protocol.errors import InsufficientMemoryError, InvalidShardError

_F16_BYTES = 2
_F32_BYTES = 4
_FIXED_BYTES = 16 << 20
"""Graphs, batches, tables of the tokenizer's size apart: 3 to 11 MiB seen with SmolLM2 and Gemma 3."""
_TOKENIZER_BYTES_PER_TOKEN = 320
"""Strings and hash tables of llama.cpp's vocabulary."""


def estimate_memory(path: Path, settings: EngineSettings) -> int:
    """Bytes that a loaded shard takes: weights, the KV cache of every session, buffers to compute in.

    An upper estimate: sliding-window layers keep less, and mapped weights are the file's own pages. Raises
    InvalidShardError for a file that is no GGUF or does not say how large its layers are.
    """
    return estimate_header(read_gguf(path), settings)


def check_memory(path: Path, settings: EngineSettings) -> int:
    """`estimate_memory`, or InsufficientMemoryError where the machine has less than that available now."""
    needed = estimate_memory(path, settings)
    available = psutil.virtual_memory().available
    if needed > available:
        raise InsufficientMemoryError(
            f"loading {path.name} takes about {needed >> 20} MiB for {settings.max_sessions} sessions of "
            f"{settings.ctx_size} tokens, {available >> 20} MiB are available; unload a shard, or lower the context "
            f"size or the number of sessions",
            {"needed_bytes": needed, "available_bytes": available},
        )
    return needed


def estimate_header(gguf: GgufFile, settings: EngineSettings) -> int:
    """`estimate_memory` of a header already read."""
    header = _Numbers(gguf)
    weights = sum(tensor.size_bytes for tensor in gguf.tensors)
    n_layers, n_embd, n_head = (
        header.one("block_count"),
        header.one("embedding_length"),
        header.most("attention.head_count"),
    )
    head_bytes = _F16_BYTES * (
        header.one("attention.key_length", n_embd // max(n_head, 1))
        + header.one("attention.value_length", n_embd // max(n_head, 1))
    )
    positions = settings.padded_ctx_size * settings.max_sessions
    kv_cache = sum(header.per_layer("attention.head_count_kv", n_layers, n_head)) * head_bytes * positions

    tokens = settings.batch_capacity
    n_vocab = max(
        (tensor.shape[-1] for tensor in gguf.tensors if tensor.name.startswith(("token_embd.", "output."))), default=0
    )
    logits = 2 * n_vocab * tokens * _F32_BYTES  # in the graph, and in the buffer that they are handed out from
    widest = max(header.per_layer("feed_forward_length", n_layers, 4 * n_embd), default=4 * n_embd)
    activations = tokens * (4 * widest + 8 * n_embd) * _F32_BYTES
    # The attention mask is a float32 of one sequence's positions a token; scores are of that size a head.
    attention = tokens * settings.padded_ctx_size * (n_head + 2) * _F32_BYTES
    tokenizer = header.array_length("tokenizer.ggml.tokens") * _TOKENIZER_BYTES_PER_TOKEN
    return weights + kv_cache + logits + activations + attention + tokenizer + _FIXED_BYTES


class _Numbers:
    """Reads hyperparameters that are one number, or one for each layer."""

    def __init__(self, gguf: GgufFile) -> None:
        self._gguf = gguf
        architecture = gguf.metadata.get("general.architecture")
        if architecture is None or not isinstance(architecture.value, str):
            raise InvalidShardError(f"{gguf.path.name} does not name its architecture (general.architecture)")
        self._prefix = architecture.value

    def most(self, key: str, default: int | None = None) -> int:
        found = self._gguf.metadata.get(f"{self._prefix}.{key}")
        value = default if found is None else found.value
        values = value if isinstance(value, tuple) else (value,)
        numbers = [number for number in values if isinstance(number, int) and 0 <= number < 1 << 32]
        if not numbers or len(numbers) != len(values):
            raise InvalidShardError(f"{self._gguf.path.name} gives no usable number for {self._prefix}.{key}")
        return max(numbers)

    def one(self, key: str, default: int | None = None) -> int:
        return self.most(key, default)

    def per_layer(self, key: str, n_layers: int, default: int) -> list[int]:
        found = self._gguf.metadata.get(f"{self._prefix}.{key}")
        most = self.most(key, default)
        if found is not None and isinstance(found.value, tuple):
            return [value for value in found.value if isinstance(value, int)]
        return [most] * min(n_layers, 100_000)

    def array_length(self, key: str) -> int:
        found = self._gguf.metadata.get(key)
        return 0 if found is None else found.count
