"""A llama model of a few kilobytes with random weights: real enough for llama.cpp, small enough to break on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_VOCAB = 64, 4, 2, 96, 300

_DEFAULTS: dict[str, Any] = {
    "llama.block_count": 4,
    "llama.context_length": 256,
    "llama.embedding_length": N_EMBD,
    "llama.feed_forward_length": N_FF,
    "llama.attention.head_count": N_HEAD,
    "llama.attention.head_count_kv": N_HEAD_KV,
    "llama.rope.dimension_count": N_EMBD // N_HEAD,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.vocab_size": N_VOCAB,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    + [f"\u2581w{n}" for n in range(N_VOCAB - 259)],
    "tokenizer.ggml.scores": [0.0] * 259 + [-float(n) for n in range(N_VOCAB - 259)],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (N_VOCAB - 259),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def write_tiny_gguf(
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    without: tuple[str, ...] = (),
    layers: tuple[int, int] = (0, 4),
    scale: float = 0.15,
    architecture: str = "llama",
) -> Path:
    """Write the layers [start, end) of the model; `metadata` overrides values, None as a value leaves one out.

    `without` leaves out tensors by name. Weights depend on the layer's number in the whole model alone, so slices
    and the whole agree.
    """
    values = dict(_DEFAULTS)
    start, end = layers
    values["llama.block_count"] = end - start
    if layers != (0, 4):
        values |= {"shoal.shard.start_layer": start, "shoal.shard.end_layer": end, "shoal.model.n_layers": 4}
    values |= metadata or {}
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in values.items():
        match value:
            case None:
                pass
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, array in _tensors(start, end, scale).items():
        if name not in without:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(start: int, end: int, scale: float) -> dict[str, np.ndarray]:
    kv = N_EMBD * N_HEAD_KV // N_HEAD

    def drawn(seed: int, *shape: int) -> np.ndarray:
        return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)

    tensors = {"token_embd.weight": drawn(1, N_VOCAB, N_EMBD), "output_norm.weight": np.ones(N_EMBD, np.float32)}
    tensors["output.weight"] = drawn(2, N_VOCAB, N_EMBD)
    for layer in range(start, end):
        block, seed = f"blk.{layer - start}", 100 * (layer + 1)
        tensors |= {
            f"{block}.attn_norm.weight": np.ones(N_EMBD, np.float32),
            f"{block}.attn_q.weight": drawn(seed, N_EMBD, N_EMBD),
            f"{block}.attn_k.weight": drawn(seed + 1, kv, N_EMBD),
            f"{block}.attn_v.weight": drawn(seed + 2, kv, N_EMBD),
            f"{block}.attn_output.weight": drawn(seed + 3, N_EMBD, N_EMBD),
            f"{block}.ffn_norm.weight": np.ones(N_EMBD, np.float32),
            f"{block}.ffn_gate.weight": drawn(seed + 4, N_FF, N_EMBD),
            f"{block}.ffn_up.weight": drawn(seed + 5, N_FF, N_EMBD),
            f"{block}.ffn_down.weight": drawn(seed + 6, N_EMBD, N_FF),
        }
    return tensors
