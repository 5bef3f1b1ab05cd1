"""A small GPT: RMSNorm before each part, rotary positions, causal attention by torch's own kernel, squared ReLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812, its usual name
from torch import nn

HEAD_CHANNELS = 64
ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class GptSettings:
    """What the weights' shapes follow from."""

    depth: int
    """Layers; each of 64 channels a layer, in heads of 64."""
    vocabulary: int
    max_tokens: int
    """Of a row."""

    @property
    def channels(self) -> int:
        return self.depth * HEAD_CHANNELS


class Attention(nn.Module):
    """Causal, with queries and keys normed, which keeps the logits bounded."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels, bias=False)

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(rows, tokens, channels) -> the same."""
        rows, tokens, channels = x.shape
        heads = self.qkv(x).view(rows, tokens, 3, -1, HEAD_CHANNELS).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        q, k = _rotated(_normed(q), rotary), _rotated(_normed(k), rotary)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(seen.transpose(1, 2).reshape(rows, tokens, channels))


class Layer(nn.Module):
    """Attention, then a perceptron, each added to what went in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(channels), nn.RMSNorm(channels)
        self.attention = Attention(channels)
        self.up = nn.Linear(channels, 4 * channels, bias=False)
        self.down = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(rows, tokens, channels) -> the same."""
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.down(F.relu(self.up(self.mlp_norm(x))).square())


class Gpt(nn.Module):
    """Its weights follow from torch's random state when it is made."""

    def __init__(self, settings: GptSettings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(settings.vocabulary, settings.channels)
        self.layers = nn.ModuleList(Layer(settings.channels) for _ in range(settings.depth))
        self.norm = nn.RMSNorm(settings.channels)
        self.head = nn.Linear(settings.channels, settings.vocabulary, bias=False)
        cosines, sines = _rotary(settings.max_tokens)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                into_the_stream = name.endswith(("attention.out.weight", "down.weight", "head.weight"))
                nn.init.zeros_(weight) if into_the_stream else nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """int64 tokens (rows, tokens) and those that follow each -> the mean cross-entropy, in nats a token."""
        x = self.embedding(inputs)
        rotary = self.cosines[: inputs.shape[1]], self.sines[: inputs.shape[1]]
        for layer in self.layers:
            x = layer(x, rotary)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _normed(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def _rotary(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (tokens, half a head) of RoFormer (arXiv 2104.09864), equation 15."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, HEAD_CHANNELS, 2) / HEAD_CHANNELS)
    angles = torch.outer(torch.arange(tokens), frequencies)
    return angles.cos(), angles.sin()


def _rotated(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    (cosines, sines), (first, second) = rotary, x.chunk(2, -1)
    return torch.cat((first * cosines - second * sines, first * sines + second * cosines), -1)
