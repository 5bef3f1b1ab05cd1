"""The layers before which each model architecture may be cut, and the reasons against others: one table.

A slice is a model of its own to llama.cpp: it counts its layers from 0, takes hidden states where a whole model takes
embeddings, and derives from its own number of layers what a whole model derives from its own. So a cut is right only
if none of the three changes what a layer computes. An architecture is in TABLE if that was tried: a random model of
it, cut and run by llama.cpp (the build in xllamacpp 2026.10.11549), gave the whole model's logits to the bit, and if a
period is given, another cut did not. REFUSED has the reasons why the other known ones cannot be cut; one that is in
neither is refused until it is tried. Source of the periods and conditions: src/models/*.cpp of llama.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from node.formats.gguf_file import GgufFile, ValueType


@dataclass(frozen=True, slots=True)
class ArchitectureRule:
    """How a given model may be cut."""

    period: int
    """Cuts are legal before multiples of this layer number; 0: before none."""
    reason: str = ""
    """Why other cuts are not legal; empty if all are."""
    ties_output: bool = True
    """Whether the loader takes token_embd for the output matrix when there is none."""
    scales_embeddings: bool = False
    """Whether slices beyond the first must be told not to scale their input, even if the model does not say a scale."""
    refused_lengths: tuple[int, ...] = ()
    """Numbers of layers that llama.cpp would take for another model."""


@dataclass(frozen=True, slots=True)
class _Row:
    output_required: bool = False
    """The loader insists on an output matrix: first slices carry it too, though they never use it."""
    window_period: int = 0
    """Every so many layers one attends to everything and the others to a window; the metadata may say otherwise."""
    window_optional: bool = False
    """Only if `attention.sliding_window` is above 0."""
    fixed_period: int = 0
    """Every so many layers one has no rotary positions; llama.cpp has the number built in."""
    interleaves_experts: bool = False
    """`interleave_moe_layer_step` says which layers have experts, by number."""
    scales_embeddings: bool = False


_PLAIN = _Row()
_OUTPUT = _Row(output_required=True)

TABLE: dict[str, _Row] = {
    "arcee": _PLAIN,
    "bailingmoe2": _OUTPUT,
    "cohere2": _Row(window_period=4),
    "command-r": _PLAIN,
    "deepseek2": _PLAIN,
    "dots1": _OUTPUT,
    "ernie4_5": _PLAIN,
    "ernie4_5-moe": _Row(interleaves_experts=True),
    "exaone": _PLAIN,
    "exaone4": _PLAIN,
    "gemma3": _Row(window_period=6, window_optional=True),
    "gpt-oss": _Row(output_required=True, window_period=2),
    "granite": _PLAIN,
    "granitemoe": _PLAIN,
    "hunyuan-dense": _PLAIN,
    "internlm2": _OUTPUT,
    "llama": _PLAIN,
    "llama4": _Row(window_period=4, fixed_period=4, interleaves_experts=True),
    "minicpm": _Row(scales_embeddings=True),
    "minimax-m2": _OUTPUT,
    "mistral3": _PLAIN,
    "nemotron": _OUTPUT,
    "olmo": _PLAIN,
    "olmo2": _Row(output_required=True, window_period=4, window_optional=True),
    "olmoe": _OUTPUT,
    "phi3": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2moe": _OUTPUT,
    "qwen3": _PLAIN,
    "qwen3moe": _PLAIN,
    "seed_oss": _PLAIN,
    "smollm3": _Row(fixed_period=4),
    "stablelm": _OUTPUT,
    "starcoder2": _PLAIN,
    "xverse": _OUTPUT,
}

_RECURRENT = "it keeps a recurrent state, and which layers do follows from their number"
_ENCODER = "it is an encoder or has one: it does not generate token by token from a stack of layers"
_DIFFUSION = "it generates by diffusion over the whole text, not token by token"
_SCALED_INPUT = "llama.cpp multiplies whatever enters it by the root of its width, so hidden states too"
_PER_LAYER_INPUT = "every layer takes an input of its own from the tokens, which later slices do not see"
_POSITIONS = "llama.cpp adds learned positions to whatever enters it, so to hidden states too"
_NORMED_INPUT = "llama.cpp normalises whatever enters it, so hidden states too"
_MULTI_ROPE = "with hidden states for input it takes four positions a token, which stages do not send"
_NO_HIDDEN_INPUT = "llama.cpp ends the process when it is given hidden states instead of tokens"
_LAYER_COUNT = "llama.cpp derives scales from the number of layers, which a slice has fewer of"

_REASONS = (
    (
        "arwkv7 falcon-h1 granitehybrid jamba kimi-linear lfm2 lfm2moe mamba mamba2 minimax-01 nemotron_h "
        "nemotron_h_moe plamo2 qwen35 qwen35moe qwen3next rwkv6 rwkv6qwen2 rwkv7",
        _RECURRENT,
    ),
    (
        "bert eurobert gemma-embedding jina-bert-v2 jina-bert-v3 llama-embed modern-bert neo-bert nomic-bert "
        "nomic-bert-moe t5 t5encoder wavtokenizer-dec",
        _ENCODER,
    ),
    ("diffusion-gemma dream llada llada-moe rnd1", _DIFFUSION),
    ("gemma gemma2", _SCALED_INPUT),
    ("gemma3n gemma4", _PER_LAYER_INPUT),
    ("gpt2 starcoder", _POSITIONS),
    ("bloom", _NORMED_INPUT),
    ("hunyuan_vl qwen2vl qwen3vl qwen3vlmoe", _MULTI_ROPE),
    ("glm4 glm4moe", _NO_HIDDEN_INPUT),
    ("baichuan minicpm3", _LAYER_COUNT),
)
REFUSED: dict[str, str] = {name: reason for names, reason in _REASONS for name in names.split()}
"""Architectures that cannot be cut, with the reason."""


def rule_of(gguf: GgufFile, n_layers: int) -> ArchitectureRule:
    """The rule for a model of `n_layers` layers. Raises InvalidShardError if metadata that it needs is malformed."""
    arch = gguf.architecture
    row = TABLE.get(arch)
    if row is None:
        why = REFUSED.get(arch, "it was not tried whether its slices compute what the whole model does")
        return ArchitectureRule(0, f"{arch}: {why}")
    if exception := _exception(gguf, arch, n_layers):
        return ArchitectureRule(0, f"{arch}: {exception}")
    periods = {row.fixed_period, _window_period(gguf, arch, row), _expert_period(gguf, arch, row)} - {0}
    period = math.lcm(*periods)
    return ArchitectureRule(
        period=period,
        reason=f"{arch} gives layers their kind by number and repeats every {period}" if period > 1 else "",
        ties_output=not row.output_required,
        scales_embeddings=row.scales_embeddings,
        refused_lengths=(26, 27, 48) if arch == "deepseek2" else (),
    )


def _window_period(gguf: GgufFile, arch: str, row: _Row) -> int:
    if not row.window_period or (row.window_optional and not gguf.integer(f"{arch}.attention.sliding_window")):
        return 1
    key = f"{arch}.attention.sliding_window_pattern"
    found = gguf.metadata.get(key)
    if found is not None and found.type is ValueType.ARRAY:
        return 1  # a value for each layer, which is divided with the layers
    period = gguf.integer(key)
    return max(1, row.window_period if period is None else period)


def _expert_period(gguf: GgufFile, arch: str, row: _Row) -> int:
    return max(1, gguf.integer(f"{arch}.interleave_moe_layer_step") or 1) if row.interleaves_experts else 1


def _exception(gguf: GgufFile, arch: str, n_layers: int) -> str | None:
    """Why this one model cannot be cut though others of its architecture can."""
    causal = gguf.metadata.get(f"{arch}.attention.causal")
    if causal is not None and causal.value is False:
        return _ENCODER
    if arch == "gemma3" and n_layers == 62:
        return "llama.cpp knows the 27B model, whose attention is scaled otherwise, by its 62 layers"
    if arch == "exaone4" and n_layers == 64:
        return "llama.cpp knows the 32B model, which has sliding windows, by its 64 layers"
    if arch == "deepseek2" and gguf.integer(f"{arch}.attention.q_lora_rank") is None:
        return "llama.cpp knows the lite models, whose queries are not compressed, by their number of layers"
    if arch == "minicpm" and f"{arch}.residual_scale" not in gguf.metadata:
        return f"the file does not say its residual scale, and {_LAYER_COUNT}"
    if arch == "llama4" and gguf.integer(f"{arch}.attention.sliding_window") == 0:
        return "without a window llama.cpp leaves out rotary positions in the last layer, so in each slice's last"
    return None
