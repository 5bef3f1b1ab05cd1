"""The memory that a shard will take, from the sizes in its GGUF header, before it is loaded.

The header is parsed in the hashing process or the engine's own, never in the daemon.
"""

from __future__ import annotations

from node.formats.hyperparameters import ModelSizes
from node.machine import available_memory_bytes
from node.pipeline.engine.settings import EngineSettings
from protocol.errors import InsufficientMemoryError

_F32_BYTES = 4
_FIXED_BYTES = 16 << 20
"""Graphs and batches: 3 to 11 MiB were seen with SmolLM2 and Gemma 3."""
_TOKENIZER_BYTES_PER_TOKEN = 320
"""Strings and hash tables of llama.cpp's vocabulary."""


def estimate_memory(sizes: ModelSizes, settings: EngineSettings) -> int:
    """Bytes that a loaded shard takes: weights, the KV cache of every session, buffers of the computation.

    An upper estimate: within 8 % for SmolLM2-135M and its slices. Layers with a sliding window keep less than is
    counted here, and mapped weights are pages of the file.
    """
    kv_cache = sizes.kv_bytes_per_token * settings.padded_ctx_size * settings.max_sessions
    tokens = settings.batch_capacity
    logits = 2 * sizes.n_vocab * tokens * _F32_BYTES  # in the graph, and in the output buffer
    activations = tokens * (4 * sizes.feed_forward_length + 8 * sizes.n_embd) * _F32_BYTES
    # Attention scores of every head, and the mask, over the positions of one session.
    attention = tokens * settings.padded_ctx_size * (sizes.n_head + 2) * _F32_BYTES
    tokenizer = sizes.n_tokens * _TOKENIZER_BYTES_PER_TOKEN
    return sizes.weights_bytes + kv_cache + logits + activations + attention + tokenizer + _FIXED_BYTES


def check_memory(name: str, sizes: ModelSizes, settings: EngineSettings) -> int:
    """`estimate_memory`; raises InsufficientMemoryError, which names the file `name`, if less is available now."""
    needed = estimate_memory(sizes, settings)
    available = available_memory_bytes()
    if needed > available:
        raise InsufficientMemoryError(
            f"loading {name} takes about {needed >> 20} MiB for {settings.max_sessions} sessions of "
            f"{settings.ctx_size} tokens, {available >> 20} MiB are available; unload a shard, or start the node with "
            f"a smaller --ctx-size or --max-sessions",
            {"needed_bytes": needed, "available_bytes": available},
        )
    return needed
