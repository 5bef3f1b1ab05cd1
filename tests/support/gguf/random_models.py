"""Random models of a few hundred kilobytes, one for each architecture: complete enough for llama.cpp to run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, HEADS, KV_HEADS, HEAD, FFN, VOCAB, EXPERT_FFN = 64, 4, 2, 16, 128, 64, 32
LAYERS = 12
Q = HEADS * HEAD

Shapes = dict[str, tuple[int, ...]]


def attention(kv_heads: int = KV_HEADS) -> Shapes:
    kv = kv_heads * HEAD
    return {
        "attn_norm.weight": (WIDTH,),
        "attn_q.weight": (WIDTH, Q),
        "attn_k.weight": (WIDTH, kv),
        "attn_v.weight": (WIDTH, kv),
        "attn_output.weight": (Q, WIDTH),
    }


def without(shapes: Shapes, *names: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name not in names}


KV = KV_HEADS * HEAD
FUSED = {"attn_norm.weight": (WIDTH,), "attn_qkv.weight": (WIDTH, Q + 2 * KV), "attn_output.weight": (Q, WIDTH)}
QKV_BIAS = {"attn_q.bias": (Q,), "attn_k.bias": (KV,), "attn_v.bias": (KV,)}
HEAD_NORMS = {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
WIDE_NORMS = {"attn_q_norm.weight": (Q,), "attn_k_norm.weight": (KV,)}
POST_NORMS = {"post_attention_norm.weight": (WIDTH,), "post_ffw_norm.weight": (WIDTH,)}
FFN_NORM = {"ffn_norm.weight": (WIDTH,)}
BIASED_NORMS = {"attn_norm.bias": (WIDTH,), "ffn_norm.bias": (WIDTH,)}
UP_DOWN = {"ffn_up.weight": (WIDTH, FFN), "ffn_down.weight": (FFN, WIDTH)}
GATED = {"ffn_gate.weight": (WIDTH, FFN), **UP_DOWN}
PROBS_BIAS = {"exp_probs_b.bias": (4,)}
LATENT = {
    "attn_norm.weight": (WIDTH,),
    "attn_q_a.weight": (WIDTH, 24),
    "attn_q_a_norm.weight": (24,),
    "attn_q_b.weight": (24, HEADS * 24),
    "attn_kv_a_mqa.weight": (WIDTH, 40),
    "attn_kv_a_norm.weight": (32,),
    "attn_k_b.weight": (16, 32, HEADS),
    "attn_v_b.weight": (32, 16, HEADS),
    "attn_output.weight": (HEADS * 16, WIDTH),
}


def experts(n: int = 4, width: int = EXPERT_FFN) -> Shapes:
    return {
        "ffn_gate_inp.weight": (WIDTH, n),
        "ffn_gate_exps.weight": (WIDTH, width, n),
        "ffn_up_exps.weight": (WIDTH, width, n),
        "ffn_down_exps.weight": (width, WIDTH, n),
    }


SHARED = {
    "ffn_gate_shexp.weight": (WIDTH, EXPERT_FFN),
    "ffn_up_shexp.weight": (WIDTH, EXPERT_FFN),
    "ffn_down_shexp.weight": (EXPERT_FFN, WIDTH),
}
STANDARD = attention() | FFN_NORM | GATED
GPT_OSS = {
    **attention(),
    **QKV_BIAS,
    "attn_output.bias": (WIDTH,),
    "attn_sinks.weight": (HEADS,),
    "post_attention_norm.weight": (WIDTH,),
    **experts(),
    "ffn_gate_inp.bias": (4,),
    "ffn_gate_exps.bias": (EXPERT_FFN, 4),
    "ffn_up_exps.bias": (EXPERT_FFN, 4),
    "ffn_down_exps.bias": (WIDTH, 4),
}
STARCODER2 = {
    **attention(),
    **BIASED_NORMS,
    **QKV_BIAS,
    "attn_output.bias": (WIDTH,),
    **FFN_NORM,
    **UP_DOWN,
    "ffn_up.bias": (FFN,),
    "ffn_down.bias": (WIDTH,),
}

BLOCKS: dict[str, Shapes] = {
    **dict.fromkeys(("llama", "mistral3", "smollm3", "granite", "gemma", "internlm2", "xverse", "minicpm"), STANDARD),
    **dict.fromkeys(("ernie4_5", "exaone"), STANDARD),
    "llama experts": attention() | FFN_NORM | experts(width=FFN),
    "granitemoe": attention() | FFN_NORM | experts(width=FFN),
    "command-r": attention() | GATED,
    "cohere2": attention() | GATED,
    "arcee": attention() | FFN_NORM | UP_DOWN,
    "qwen2": STANDARD | QKV_BIAS,
    "seed_oss": attention() | {"post_attention_norm.weight": (WIDTH,)} | GATED,
    "qwen3": STANDARD | HEAD_NORMS,
    "hunyuan-dense": STANDARD | HEAD_NORMS,
    "qwen3moe": attention() | HEAD_NORMS | FFN_NORM | experts(),
    "qwen2moe": attention() | QKV_BIAS | FFN_NORM | experts() | {"ffn_gate_inp_shexp.weight": (WIDTH,)} | SHARED,
    "olmoe": attention(HEADS)
    | {"attn_q_norm.weight": (Q,), "attn_k_norm.weight": (Q,)}
    | FFN_NORM
    | experts(width=FFN),
    "olmo": without(attention(), "attn_norm.weight") | GATED,
    "stablelm": STANDARD | BIASED_NORMS,
    "starcoder2": STARCODER2,
    "nemotron": attention() | BIASED_NORMS | FFN_NORM | UP_DOWN,
    "phi3": FUSED | FFN_NORM | {"ffn_up.weight": (WIDTH, 2 * FFN), "ffn_down.weight": (FFN, WIDTH)},
    "gemma2": STANDARD | POST_NORMS,
    "gemma3": STANDARD | HEAD_NORMS | POST_NORMS,
    "olmo2": without(attention(), "attn_norm.weight") | WIDE_NORMS | GATED | POST_NORMS,
    "exaone4": without(attention(), "attn_norm.weight") | HEAD_NORMS | GATED | POST_NORMS,
    "gpt-oss": GPT_OSS,
    "minimax-m2": attention() | WIDE_NORMS | FFN_NORM | experts(width=FFN) | PROBS_BIAS,
}
"""Tensors of a block, where all blocks are alike."""


def leading_dense(common: Shapes, sparse: Shapes) -> Callable[[int], Shapes]:
    return lambda layer: common | (GATED if layer < 3 else sparse)


MIXED: dict[str, Callable[[int], Shapes]] = {
    "dots1": leading_dense(attention(HEADS) | HEAD_NORMS | FFN_NORM, experts() | SHARED | PROBS_BIAS),
    "bailingmoe2": leading_dense(FUSED | HEAD_NORMS | FFN_NORM, experts() | SHARED | PROBS_BIAS),
    "ernie4_5-moe": leading_dense(attention() | FFN_NORM, experts() | SHARED | PROBS_BIAS),
    "deepseek2": leading_dense(LATENT | FFN_NORM, experts() | SHARED),
    "llama4": lambda layer: attention() | FFN_NORM | (experts(16) | SHARED if layer % 2 else GATED),
}

EXPERTS: dict[str, Any] = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": EXPERT_FFN}
DENSE_FIRST: dict[str, Any] = {
    **EXPERTS,
    "expert_shared_count": 1,
    "expert_shared_feed_forward_length": EXPERT_FFN,
    "leading_dense_block_count": 3,
    "expert_weights_scale": 1.0,
}
SCALES: dict[str, Any] = {"logit_scale": 4.0, "embedding_scale": 12.0, "residual_scale": 0.5}
METADATA: dict[str, dict[str, Any]] = {
    "llama experts": EXPERTS,
    "granite": SCALES | {"attention.scale": 0.1},
    "granitemoe": SCALES | EXPERTS,
    "minicpm": SCALES,
    "qwen3moe": EXPERTS,
    "qwen2moe": EXPERTS | {"expert_shared_feed_forward_length": EXPERT_FFN},
    "olmoe": EXPERTS | {"attention.head_count_kv": HEADS},
    "gemma2": {
        "attention.sliding_window": 8,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {"attention.sliding_window": 8},
    "cohere2": {"attention.sliding_window": 8, "logit_scale": 0.25},
    "command-r": {"logit_scale": 0.25},
    "olmo2": {"attention.sliding_window": 8},
    "gpt-oss": EXPERTS | {"attention.sliding_window": 8},
    "llama4": {
        "expert_count": 16,
        "expert_used_count": 1,
        "expert_feed_forward_length": EXPERT_FFN,
        "interleave_moe_layer_step": 2,
    },
    "minimax-m2": EXPERTS | {"expert_gating_func": 2},
    "dots1": DENSE_FIRST | {"expert_gating_func": 2, "attention.head_count_kv": HEADS},
    "bailingmoe2": DENSE_FIRST | {"expert_gating_func": 2, "expert_group_count": 1, "expert_group_used_count": 1},
    "ernie4_5-moe": DENSE_FIRST | {"interleave_moe_layer_step": 1},
    "deepseek2": DENSE_FIRST
    | {
        "attention.kv_lora_rank": 32,
        "attention.q_lora_rank": 24,
        "attention.key_length": 40,
        "attention.value_length": 32,
        "attention.key_length_mla": 24,
        "attention.value_length_mla": 16,
        "rope.dimension_count": 8,
        "attention.head_count_kv": 1,
    },
    "stablelm": {"use_parallel_residual": False},
}
TIED = ("gemma", "gemma2", "cohere2", "command-r")
BIASED_OUTPUT_NORM = ("stablelm", "starcoder2", "nemotron")


def write_random_model(
    path: Path,
    architecture: str,
    *,
    layers: int = LAYERS,
    tied: bool | None = None,
    metadata: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
) -> Path:
    """Write a model of float32 weights; `metadata` goes over the architecture's, a value of None leaves a key out."""
    name = architecture.partition(" ")[0]
    writer = gguf.GGUFWriter(str(path), name)
    writer.add_string("general.name", f"Random {architecture}")
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    values: dict[str, Any] = {
        "block_count": layers,
        "context_length": 256,
        "embedding_length": WIDTH,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.dimension_count": HEAD,
        "rope.freq_base": 10000.0,
        "vocab_size": VOCAB,
        **METADATA.get(architecture, {}),
        **(metadata or {}),
    }
    for key, value in values.items():
        match value:
            case None:
                continue
            case bool():
                writer.add_bool(f"{name}.{key}", value)
            case int():
                writer.add_uint32(f"{name}.{key}", value)
            case float():
                writer.add_float32(f"{name}.{key}", value)
            case _:
                writer.add_array(f"{name}.{key}", value)
    shapes: Shapes = {"token_embd.weight": (WIDTH, VOCAB)}
    if name != "olmo":
        shapes["output_norm.weight"] = (WIDTH,)
    if name in BIASED_OUTPUT_NORM:
        shapes["output_norm.bias"] = (WIDTH,)
    if not (name in TIED if tied is None else tied):
        shapes["output.weight"] = (WIDTH, VOCAB)
    shapes |= extra_tensors or {}
    for layer in range(layers):
        block = MIXED[architecture](layer) if architecture in MIXED else BLOCKS[architecture]
        shapes |= {f"blk.{layer}.{tensor}": shape for tensor, shape in block.items()}
    random = np.random.default_rng(seed)
    for tensor, shape in shapes.items():
        weights = random.standard_normal(shape[::-1])
        if "norm" in tensor and tensor.endswith("weight"):
            weights = 1 + 0.1 * weights
        elif tensor.endswith("bias"):
            weights = 0.1 * weights
        else:
            weights /= np.sqrt(shape[0])
        writer.add_tensor(tensor, weights.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
