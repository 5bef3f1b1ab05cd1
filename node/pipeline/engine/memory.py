"""How much memory a shard will take, from its GGUF header alone, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from node.formats.gguf import GgufFile, read_gguf
from node.machine import available_memory_bytes
from node.pipeline.engine.hyperparameters import Hyperparameters
from node.pipeline.engine.settings import EngineSettings
from protocol.errors import InsufficientMemoryError

_F16_BYTES = 2
_F32_BYTES = 4
_FIXED_BYTES = 16 << 20
"""Graphs, batches and the like: 3 to 11 MiB seen with SmolLM2 and Gemma 3."""
_TOKENIZER_BYTES_PER_TOKEN = 320
"""Strings and hash tables of llama.cpp's vocabulary."""


def estimate_memory(path: Path, settings: EngineSettings) -> int:
    """Bytes that a loaded shard takes: weights, the KV cache of every session, buffers to compute in.

    An upper estimate: within 8 % for SmolLM2-135M and its slices; layers with a sliding window keep less than
    this counts, and mapped weights are the file's own pages. Raises InvalidShardError for a file that is no GGUF,
    or whose header says nothing that llama.cpp could load.
    """
    return _estimate(read_gguf(path), settings)


def check_memory(path: Path, settings: EngineSettings) -> int:
    """`estimate_memory`, or InsufficientMemoryError where the machine has less than that available now."""
    needed = estimate_memory(path, settings)
    available = available_memory_bytes()
    if needed > available:
        raise InsufficientMemoryError(
            f"loading {path.name} takes about {needed >> 20} MiB for {settings.max_sessions} sessions of "
            f"{settings.ctx_size} tokens, {available >> 20} MiB are available; unload a shard, or lower the context "
            f"size or the number of sessions",
            {"needed_bytes": needed, "available_bytes": available},
        )
    return needed


def _estimate(gguf: GgufFile, settings: EngineSettings) -> int:
    header = Hyperparameters(gguf)
    header.check()
    n_layers, n_embd = header.one("block_count"), header.one("embedding_length")
    n_head = header.one("attention.head_count")
    head = n_embd // max(n_head, 1)
    head_bytes = _F16_BYTES * (header.one("attention.key_length", head) + header.one("attention.value_length", head))
    n_head_kv = sum(header.per_layer("attention.head_count_kv", n_layers, n_head))
    kv_cache = n_head_kv * head_bytes * settings.padded_ctx_size * settings.max_sessions

    tokens = settings.batch_capacity
    embeddings = (tensor for tensor in gguf.tensors if tensor.name in ("token_embd.weight", "output.weight"))
    n_vocab = max((tensor.shape[-1] for tensor in embeddings), default=0)
    logits = 2 * n_vocab * tokens * _F32_BYTES  # in the graph, and in the buffer that they are handed out from
    widest = header.one("feed_forward_length", 4 * n_embd)
    activations = tokens * (4 * widest + 8 * n_embd) * _F32_BYTES
    # Attention scores of every head, and the mask, over the positions of one session.
    attention = tokens * settings.padded_ctx_size * (n_head + 2) * _F32_BYTES

    vocabulary = gguf.metadata.get("tokenizer.ggml.tokens")
    tokenizer = 0 if vocabulary is None else vocabulary.count * _TOKENIZER_BYTES_PER_TOKEN
    weights = sum(tensor.size_bytes for tensor in gguf.tensors)
    return weights + kv_cache + logits + activations + attention + tokenizer + _FIXED_BYTES
