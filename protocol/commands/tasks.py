"""EXECUTE_TASK: the parameters and results of its built-in task types."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from protocol.commands.common import ChatMessage, NameOrDigest, Params, Result, ShardSelector, Text
from protocol.ids import ContentId, NodeId


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is drawn. Randomness follows from (seed, position) alone."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    """0 is greedy."""
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    """0: no bound."""
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0


class InferenceParams(Params, frozen=True, kw_only=True):
    """Parameters of the task type `ai_inference`; `prompt` or `messages`, not both."""

    model: NameOrDigest | None = None
    prompt: Text | None = None
    """Goes in as it is; the tokenizer's own rule says whether a BOS token comes first."""
    messages: Annotated[tuple[ChatMessage, ...], msgspec.Meta(min_length=1, max_length=1000)] | None = None
    """Go through the model's chat template."""
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 128
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0
    stop: tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=1000)], ...] = ()
    stream: bool = False
    exact: bool = False
    """Decode this session alone, in fixed batch shapes, so that it can be reproduced to the bit."""
    auto_load: bool = True
    """False: fail with `shard_not_loaded` rather than load a shard."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=self.seed
        )


class StageAssignment(Result, frozen=True, kw_only=True):
    """Which node ran which part of a pipeline."""

    node: NodeId
    shards: list[int]
    layers: tuple[int, int]
    """[start_layer, end_layer)."""


class Usage(Result, frozen=True, kw_only=True):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int


class Timings(Result, frozen=True, kw_only=True):
    """Seconds, as the coordinating node saw them."""

    load_s: float
    """Until every shard was loaded."""
    time_to_first_token_s: float
    """From the opened session on."""
    total_s: float
    """Of the generation, loading left out."""
    tokens_per_s: float
    """After the first token."""


FinishReason = Literal["stop", "length"]


class InferenceResult(Result, frozen=True, kw_only=True):
    """Answer of EXECUTE_TASK for `ai_inference`."""

    text: str
    tokens: list[int]
    """Generated token ids; the end-of-text token is not among them."""
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    stages: list[StageAssignment]


class TaskOutput(Result, frozen=True, kw_only=True):
    """TASK_OUTPUT notification of a streaming task."""

    request_id: str
    text: str
    """Whole characters, which no stop string can still swallow."""
    tokens: list[int]


class VerifyShardParams(ShardSelector, frozen=True, kw_only=True):
    """Parameters of the task type `verify_shard`: hash the file on disk again."""


class VerifyShardResult(Result, frozen=True, kw_only=True):
    """Answer of EXECUTE_TASK for `verify_shard`."""

    valid: bool
    expected: ContentId
    found: ContentId | None
    """None if the file cannot be read."""
    path: str
    seconds: float
