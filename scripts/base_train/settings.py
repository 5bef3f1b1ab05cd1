"""The flags of base_train, and what follows from them by arithmetic."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.manifest import ShardEntry


@dataclass(frozen=True)
class Settings:
    """The flags, by their names."""

    depth: int
    max_seq_len: int
    device_batch_size: int
    total_batch_size: int
    num_iterations: int
    learning_rate: float
    streaming_mode: bool
    streaming_buffer_size: int
    streaming_total_shards: int
    eval_tokens: int
    eval_every: int
    core_metric_every: int
    source: str | None
    dataset: str | None
    folder: Path
    column: str
    run: str
    seed: int
    threads: int
    log_every: int
    save: Path | None
    save_every: int
    resume: Path | None
    json: bool

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that one device takes at once."""
        return self.device_batch_size * self.max_seq_len

    @property
    def tokens(self) -> int:
        """That the whole run trains on."""
        return self.num_iterations * self.total_batch_size


def parsed(arguments: Sequence[str] | None, about: str, default_folder: Path) -> Settings:
    """Exits with 2, and says why, if a flag is wrong."""
    parser = argparse.ArgumentParser("base_train", description=about, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--depth", type=int, default=4, help="layers; 64 channels each")
    add("--max_seq_len", type=int, default=512, help="tokens of a row")
    add("--device_batch_size", type=int, default=1, help="rows that a device takes at once")
    add("--total_batch_size", type=int, default=512, help="tokens of a step, over all devices")
    add("--num_iterations", type=int, default=50, help="steps")
    add("--learning_rate", type=float, default=2e-3, help="the highest; it warms up, and falls to a tenth")
    add("--streaming_mode", type=_truth, default=True, help="True: a window of shards; False: read a folder of them")
    add("--streaming_buffer_size", type=int, default=3, help="shards fetched ahead of those being read")
    add("--streaming_total_shards", type=int, default=5, help="shards to train on, at most")
    add("--eval_tokens", type=int, default=512, help="tokens of an evaluation, of the last shard; 0: none")
    add("--eval_every", type=int, default=-1, help="steps between evaluations; -1: one at the end")
    add("--core_metric_every", type=int, default=-1, help="-1 only: the CORE metric's tasks are not part of this")
    add("--source", help="a node's HOST:PORT, an origin's URL, or a folder of shards\nleft out: a corpus is made")
    add("--dataset", help="the data set's name there, OWNER/NAME")
    add("--folder", type=Path, default=default_folder, help=f"where shards go ({default_folder})")
    add("--column", default="text", help="of the shards")
    add("--run", default="base_train", help="another name for a second run at the same time, in the same folder")
    add("--seed", type=int, default=0, help="of the weights and of the order")
    add("--threads", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="on a CPU; half of the cores")
    add("--log_every", type=int, default=10, help="steps between lines of loss")
    add("--save", type=Path, help="a folder for the state of the run: step_00050.pt")
    add("--save_every", type=int, default=-1, help="steps between states; -1: one at the end")
    add("--resume", type=Path, help="go on from such a file, with the other flags as they were")
    add("--json", action="store_true", help="a line of JSON an event, on stdout")
    settings = Settings(**vars(parser.parse_args(arguments)))
    if wrong := refusal(settings):
        parser.error(wrong)
    return settings


def refusal(settings: Settings) -> str | None:
    """What is wrong with the flags; None if nothing is."""
    for name in (
        "depth",
        "max_seq_len",
        "device_batch_size",
        "total_batch_size",
        "num_iterations",
        "streaming_buffer_size",
        "streaming_total_shards",
        "log_every",
        "threads",
    ):
        if getattr(settings, name) < 1:
            return f"--{name}={getattr(settings, name)}: at least 1"
    if settings.core_metric_every != -1:
        return (
            f"--core_metric_every={settings.core_metric_every}: the CORE metric needs its evaluation tasks, which this "
            "script does not have; -1 leaves it out"
        )
    if settings.eval_tokens < 0 or settings.seed < 0:
        return f"--eval_tokens={settings.eval_tokens} and --seed={settings.seed} must not be negative"
    for name in ("eval_every", "save_every"):
        if getattr(settings, name) < 1 and getattr(settings, name) != -1:
            return f"--{name}={getattr(settings, name)}: at least 1, or -1"
    if not settings.streaming_mode and settings.source is not None and not Path(settings.source).is_dir():
        return (
            f"--streaming_mode=False reads a folder that holds the shards, and --source={settings.source} is none here"
        )
    return None


def accumulation(settings: Settings, world: int) -> int:
    """Micro-batches of a step on each of `world` devices. Raises ValueError if they do not come out even."""
    together = settings.micro_batch_tokens * world
    if settings.total_batch_size % together:
        below = settings.total_batch_size // together * together or together
        raise ValueError(
            f"--total_batch_size={settings.total_batch_size} is not a multiple of {together} = device_batch_size "
            f"{settings.device_batch_size} x max_seq_len {settings.max_seq_len} x {world} devices: take {below}"
        )
    return settings.total_batch_size // together


def evaluation_batches(settings: Settings, world: int) -> int:
    """Micro-batches of an evaluation on each device, at least 1 if there is one at all."""
    return -(-settings.eval_tokens // (settings.micro_batch_tokens * world))


def expected_tokens(entry: ShardEntry, tokens_per_row: float, tokens_per_byte: float) -> int:
    """Of a shard, by its rows and by its bytes on disk as measured on another one: the lower of both."""
    by_bytes = entry.size * tokens_per_byte
    return int(min(by_bytes, by_bytes if entry.rows is None else entry.rows * tokens_per_row))


def shards_needed(shard_tokens: Sequence[int], tokens: int, at_most: int) -> int:
    """How many of these shards, from the first on, have so many tokens; with a twentieth to spare."""
    held = 0
    for count, held_here in enumerate(shard_tokens[:at_most], 1):
        held += held_here
        if held >= tokens * 1.05:
            return count
    return min(len(shard_tokens), at_most)


def learning_rate(settings: Settings, step: int) -> float:
    """Of a step, from 0 on: up over the first tenth of the run (100 steps at most), then a cosine down to a tenth."""
    warm = min(100, max(1, settings.num_iterations // 10))
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, settings.num_iterations - warm)
    return settings.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def _truth(text: str) -> bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"True or False, not {text!r}")
