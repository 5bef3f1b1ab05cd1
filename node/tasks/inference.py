"""`ai_inference`: generate text through a pipeline of the cluster's nodes."""

from __future__ import annotations

import time
from contextlib import aclosing
from typing import Any

from node.pipeline.driver.attempt import GenerationRequest
from node.pipeline.driver.generation import Generation
from node.pipeline.driver.text_stream import TextStream
from node.rpc import Call
from node.tasks.placement import Placement
from node.tasks.registry import TaskContext, TaskType
from protocol.commands.tasks import (
    FinishReason,
    InferenceParams,
    InferenceResult,
    StageAssignment,
    TaskOutput,
    Timings,
    Usage,
)
from protocol.errors import ContextOverflowError, InvalidParamsError


async def run_inference(context: TaskContext, params: InferenceParams, call: Call) -> InferenceResult:
    """Drive one generation; this node need not run any of its stages.

    Raises InvalidParamsError unless exactly one of prompt and messages is given, ContextOverflowError before
    anything is loaded where the answer alone cannot fit, and what `Generation.tokens` raises.
    """
    if (params.prompt is None) == (params.messages is None):
        raise InvalidParamsError("give either prompt or messages")
    signed = await context.shards.resolve("model", params.model)
    model = signed.manifest.model
    if model is None:
        raise InvalidParamsError(f"{signed.manifest.name!r} is a {signed.manifest.kind}, not a model")
    context_length = min(model.context_length, context.ctx_size)
    if params.max_tokens >= context_length:
        raise ContextOverflowError(
            f"an answer of up to {params.max_tokens} tokens leaves no room for a prompt: a session here has "
            f"{context_length} (the model's context, or less by --ctx-size); lower max_tokens",
            {"context_length": context_length},
        )

    def tell(progress: dict[str, Any]) -> None:
        call.notify("PROGRESS", progress | {"request_id": call.request_id})

    placement = Placement(context, signed, params.auto_load, context.ctx_size, tell)
    generation = Generation(
        GenerationRequest(
            model=signed.digest,
            context_length=context_length,
            prompt=params.prompt,
            messages=params.messages,
            max_tokens=params.max_tokens,
            sampling=params.sampling,
            exact=params.exact,
        ),
        placement.make_plan,
        placement.connect,
    )
    return await _Answer(params, call, generation, placement).collect()


class _Answer:
    """Tokens as they come, turned into text, notifications and the result."""

    def __init__(self, params: InferenceParams, call: Call, generation: Generation, placement: Placement) -> None:
        self._params, self._call, self._generation, self._placement = params, call, generation, placement
        self._stream = TextStream(params.stop)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._untold: list[int] = []
        self._load_s = 0.0
        """Of the first plan; a later one, after a stage was lost, counts as the generation's time."""

    async def collect(self) -> InferenceResult:
        started = time.monotonic()
        drawn: list[float] = []
        finish: FinishReason = "length"
        async with aclosing(self._generation.tokens()) as tokens:
            async for token in tokens:
                if not drawn:
                    self._load_s = self._placement.load_s
                drawn.append(time.monotonic())
                if token.end:
                    finish = "stop"
                    break
                self._tokens.append(token.token)
                self._untold.append(token.token)
                self._tell(self._stream.feed(token.piece))
                if self._stream.stopped:
                    finish = "stop"
                    break
        self._tell(self._stream.finish(), last=True)
        plan = self._generation.plan
        return InferenceResult(
            text="".join(self._text),
            tokens=self._tokens,
            finish_reason=finish,
            usage=Usage(prompt_tokens=self._generation.prompt_tokens, completion_tokens=len(self._tokens)),
            timings=self._timings(started, drawn),
            stages=[
                StageAssignment(node=stage.node_id, shards=list(stage.shards), layers=stage.layers)
                for stage in (plan.stages if plan else ())
            ],
        )

    def _timings(self, started: float, drawn: list[float]) -> Timings:
        """From when each token came, the one that ends the text among them; there is at least one."""
        begun, first, last = started + self._load_s, drawn[0], drawn[-1]
        return Timings(
            load_s=self._load_s,
            time_to_first_token_s=first - begun,
            total_s=last - begun,
            tokens_per_s=(len(drawn) - 1) / (last - first) if last > first else 0.0,
        )

    def _tell(self, text: str, *, last: bool = False) -> None:
        self._text.append(text)
        if self._params.stream and (text or (last and self._untold)):
            self._call.notify(
                "TASK_OUTPUT", TaskOutput(request_id=self._call.request_id, text=text, tokens=self._untold)
            )
            self._untold = []


AI_INFERENCE = TaskType("ai_inference", InferenceParams, run_inference)
