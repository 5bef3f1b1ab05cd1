"""`ai_inference`: generate text through a pipeline of the cluster's nodes."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from node.clock import Clock
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

    Raises InvalidParamsError unless exactly one of prompt and messages is given, ContextOverflowError before anything
    is loaded if the answer alone does not fit, and what `Generation.tokens` raises.
    """
    if (params.prompt is None) == (params.messages is None):
        raise InvalidParamsError("give either prompt or messages, exactly one of them")
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

    def on_progress(progress: dict[str, Any]) -> None:
        call.notify("PROGRESS", progress | {"request_id": call.request_id})

    placement = Placement(context, signed, params.auto_load, context.ctx_size, on_progress)
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
    return await AnswerCollector(params, call, generation, placement).collect()


class AnswerCollector:
    """Makes text, notifications and the result of the tokens of a generation."""

    def __init__(
        self,
        params: InferenceParams,
        call: Call,
        generation: Generation,
        placement: Placement,
        clock: Clock | None = None,
    ) -> None:
        self._params, self._call, self._generation, self._placement = params, call, generation, placement
        self._clock = clock or Clock()
        self._stream = TextStream(params.stop)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._unsent: list[int] = []
        """Tokens that no notification has carried yet."""
        self._load_s = 0.0
        """Of the first plan; a later one, after a stage was lost, counts as time of the generation."""

    async def collect(self) -> InferenceResult:
        """Iterate the generation to its end, or to a stop string. Raises what `Generation.tokens` raises."""
        started = self._clock.now()
        times: list[float] = []
        finish: FinishReason = "length"
        async with aclosing(self._generation.tokens()) as tokens:
            async for token in tokens:
                if not times:
                    self._load_s = self._placement.load_s
                times.append(self._clock.now())
                if token.end:
                    finish = "stop"
                    break
                self._tokens.append(token.token)
                self._unsent.append(token.token)
                self._send(self._stream.feed(token.piece))
                if self._stream.stopped:
                    finish = "stop"
                    break
        self._send(self._stream.finish(), last=True)
        plan = self._generation.plan
        return InferenceResult(
            text="".join(self._text),
            tokens=self._tokens,
            finish_reason=finish,
            usage=Usage(prompt_tokens=self._generation.prompt_tokens, completion_tokens=len(self._tokens)),
            timings=self._timings(started, times),
            stages=[
                StageAssignment(node=stage.node_id, shards=list(stage.shards), layers=stage.layers)
                for stage in (plan.stages if plan else ())
            ],
        )

    def _timings(self, started: float, times: list[float]) -> Timings:
        """From the times of all tokens, at least one; the end token counts."""
        begun, first, last = started + self._load_s, times[0], times[-1]
        return Timings(
            load_s=self._load_s,
            time_to_first_token_s=first - begun,
            total_s=last - begun,
            tokens_per_s=(len(times) - 1) / (last - first) if last > first else 0.0,
        )

    def _send(self, text: str, *, last: bool = False) -> None:
        self._text.append(text)
        if self._params.stream and (text or (last and self._unsent)):
            self._call.notify(
                "TASK_OUTPUT", TaskOutput(request_id=self._call.request_id, text=text, tokens=self._unsent)
            )
            self._unsent = []


AI_INFERENCE = TaskType("ai_inference", InferenceParams, run_inference)
