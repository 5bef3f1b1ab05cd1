r"""Trains a small GPT on text shards that are fetched while it trains, and deleted behind it.

    python -m scripts.base_train --depth=4 --max_seq_len=512 --device_batch_size=1 --total_batch_size=512 \
        --num_iterations=50 --streaming_mode=True --streaming_buffer_size=3 --streaming_total_shards=5 \
        --eval_tokens=512 --core_metric_every=-1

    ... --source=127.0.0.1:7400 --dataset=me/text          from this machine's node
    ... --source=o3://bucket/prefix --dataset=me/text      straight from an origin
    ... --source=/data/shards                              from a folder of parquet files

Without --source it makes a corpus. Several devices: torchrun --nproc-per-node=2 -m scripts.base_train ...
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs
import torch
import torch.distributed as dist

from node.files import atomic_file
from protocol.errors import ShoalError
from scripts.base_train import tokenizer as byte_tokenizer
from scripts.base_train.data import Data, opened
from scripts.base_train.model import Gpt, GptSettings
from scripts.base_train.report import Report
from scripts.base_train.settings import Settings, accumulation, evaluation_batches, learning_rate, parsed
from torch_bridge.core.ranks import Ranks
from torch_bridge.shards.status import StreamingStatus

STATUS_EVERY = 100
"""Steps between two lines of the streaming status."""


class Run:
    """The state of a training run: model, optimiser, loader, step."""

    def __init__(self, settings: Settings, data: Data, device: torch.device) -> None:
        self.settings, self.data, self.device = settings, data, device
        self.world, self.rank = data.documents.ranks.world_size, data.documents.ranks.rank
        self.micro_batches = accumulation(settings, self.world)
        torch.manual_seed(settings.seed)  # the same weights on every rank
        shape = GptSettings(settings.depth, byte_tokenizer.VOCABULARY, settings.max_seq_len)
        self.model = Gpt(shape).to(device)
        matrices = [weight for weight in self.model.parameters() if weight.ndim > 1]
        others = [weight for weight in self.model.parameters() if weight.ndim < 2]
        self.optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95)
        )
        self.step_number = 0
        self.place: dict[str, Any] = {}

    def step(self, batches: Iterator[Any]) -> float:
        """One step of the optimiser; the mean loss over all ranks, in nats a token."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.settings, self.step_number)
        mean = torch.zeros((), device=self.device)
        for _ in range(self.micro_batches):
            inputs, targets, self.place = next(batches)
            loss = self._loss(inputs, targets) / self.micro_batches
            loss.backward()
            mean += loss.detach()
        weights = [weight for weight in self.model.parameters() if weight.grad is not None]
        for weight in weights:
            weight.grad = self._mean(weight.grad)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step_number += 1
        return self._mean(mean).item()

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over --eval_tokens of the validation shard, each time the same ones."""
        count = evaluation_batches(self.settings, self.world)
        total = torch.zeros((), device=self.device)
        with closing(iter(self.data.evaluation)) as batches:
            for inputs, targets, _ in itertools.islice(batches, count):
                total += self._loss(inputs, targets)
        return self._mean(total / count).item()

    def status(self) -> StreamingStatus | None:
        """Of this rank's window, with what all ranks moved: on one machine each shard comes to one of them."""
        mine = self.data.documents.status()
        if self.world == 1:
            return mine
        told: list[Any] = [None] * self.world
        dist.all_gather_object(told, mine)
        moved: Counter[str] = sum((Counter(status.bytes_by_source) for status in told if status), Counter())
        return mine and replace(mine, bytes_by_source=dict(moved))

    def save(self, folder: Path) -> Path:
        """Write the state, with the position of every rank in the data; rank 0 writes.

        Raises RuntimeError if the ranks' weights differ: gradients did not reach all of them.
        """
        mark = sum(float(weight.detach().double().sum()) for weight in self.model.parameters())
        told: list[Any] = [(self.place, mark)]
        if self.world > 1:
            told = [None] * self.world
            dist.all_gather_object(told, (self.place, mark))
        places = [place for place, _ in told]
        if any(other != mark for _, other in told):
            raise RuntimeError(f"after step {self.step_number} the weights of the {self.world} ranks differ")
        path = folder / f"step_{self.step_number:05d}.pt"
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            state = {
                "step": self.step_number,
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "places": places,
            }
            with atomic_file(path, "contents") as file:
                torch.save(state, file)
        return path

    def load(self, path: Path) -> None:
        """Continue from a saved state. Raises ShoalError if the data cannot be continued, OSError, RuntimeError."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step_number = int(state["step"])
        self.data.training.load_state_dicts(state["places"])

    def _loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda", dtype=torch.bfloat16) if cuda else nullcontext():
            return self.model(inputs.to(self.device), targets.to(self.device))

    def _mean(self, value: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value


def train(run: Run, report: Report) -> None:
    """Train to step --num_iterations."""
    settings, began = run.settings, time.monotonic()
    first = run.step_number
    looked_at, looked = began, first
    with closing(iter(run.data.training)) as batches:
        while run.step_number < settings.num_iterations:
            loss = run.step(batches)
            step, last = run.step_number, run.step_number == settings.num_iterations
            now = time.monotonic()
            tokens_s = (step - looked) * settings.total_batch_size / max(now - looked_at, 1e-9)
            report.step(step, loss, tokens_s)
            if step % settings.log_every == 0 or last or step == first + 1:
                line = f"step {step:>5}/{settings.num_iterations}  loss {loss:.4f}  {tokens_s:>8,.0f} tokens/s"
                report.say("step", line, step=step, loss=loss, tokens_s=round(tokens_s, 1))
                looked_at, looked = now, step
            if step % STATUS_EVERY == 0 or last:
                report.status(step, run.status())
            if settings.eval_tokens and (last or (settings.eval_every > 0 and step % settings.eval_every == 0)):
                paused = time.monotonic()
                found = run.evaluate()
                report.say("evaluation", f"  validation  loss {found:.4f}", step=step, loss=found)
                looked_at += time.monotonic() - paused
            if settings.save and (last or (settings.save_every > 0 and step % settings.save_every == 0)):
                path = run.save(settings.save)
                report.say("saved", f"  saved      {path}", step=step, path=str(path))
    seconds, tokens = time.monotonic() - began, (run.step_number - first) * settings.total_batch_size
    line = f"{tokens:,} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s with all pauses"
    report.say("done", line, tokens=tokens, seconds=round(seconds, 2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if the run failed, with one line that says why."""
    settings = parsed(arguments, __doc__ or "", Path(platformdirs.user_cache_dir("shoal")) / "base_train")
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    torch.set_num_threads(settings.threads)  # beside other work, a thread too many spins and waits for all others
    try:
        ranks = Ranks.found()
        accumulation(settings, ranks.world_size)
        if ranks.world_size > 1:
            dist.init_process_group("nccl" if cuda else "gloo")
        data = _opened(settings, ranks)
        run = Run(settings, data, device)
        if settings.resume:
            run.load(settings.resume)
        with Report(as_json=settings.json, speaks=ranks.rank == 0, steps=settings.num_iterations) as report:
            _tell(run, report)
            train(run, report)
    except (ShoalError, OSError, RuntimeError, ValueError) as err:
        sys.stderr.write(f"base_train: {err}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("base_train: interrupted\n")
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _opened(settings: Settings, ranks: Ranks) -> Data:
    """Rank 0 goes first: it makes and fetches what the others then find."""
    if ranks.world_size == 1:
        return opened(settings, ranks)
    if ranks.rank == 0:
        data = opened(settings, ranks)
    dist.barrier()
    if ranks.rank != 0:
        data = opened(settings, ranks)
    return data


def _tell(run: Run, report: Report) -> None:
    settings, data = run.settings, run.data
    weights = sum(weight.numel() for weight in run.model.parameters())
    lines = [
        f"data        {data.where}",
        f"shards      {len(data.shards)} of about {data.expected_tokens:,} tokens, for {settings.tokens:,} "
        f"({settings.tokens / max(data.expected_tokens, 1):.2f} epochs); validation: {data.validation}",
        f"model       {settings.depth} layers, {weights / 1e6:.1f} million weights, on {run.device}",
        f"step        {settings.total_batch_size:,} tokens: {run.micro_batches} x {settings.device_batch_size} x "
        f"{settings.max_seq_len} on each of {run.world}",
    ]
    if run.step_number:
        lines.append(f"continued   {settings.resume}, after step {run.step_number}")
    report.say(
        "start",
        "\n".join(lines),
        data=data.where,
        shards=list(data.shards),
        validation=data.validation,
        expected_tokens=data.expected_tokens,
        weights=weights,
        device=str(run.device),
        world=run.world,
        micro_batches=run.micro_batches,
        step=run.step_number,
    )


if __name__ == "__main__":
    sys.exit(main())
