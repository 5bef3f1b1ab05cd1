"""How long a training loop stands still for a checkpoint: O3CheckpointManager, waited for and not, and torch.save.

    python -m scripts.bench.checkpoint --mib 256 --repeats 5 --s3

A model and its AdamW state, all of it changed before each save. torch.save and the manager write to folders on one
disk, alternately; the manager brings what it writes to the disk, so torch.save is timed with an fsync, too. "ready" is
when the checkpoint is whole. `--s3` measures a local SeaweedFS as well, `--url` another origin. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from node.cli.demo.s3_server import running_s3
from node.files import fsync_file
from torch_bridge import O3CheckpointManager, O3Client

LAYER = 1024
"""Rows and columns of a layer: 4 MiB, and 8 MiB more in the optimizer."""


def training(mib: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model whose weights and optimizer take about `mib` mebibytes."""
    layers = [torch.nn.Linear(LAYER, LAYER, bias=False) for _ in range(max(1, mib // 12))]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    change(model, optimizer)
    return model, optimizer


def change(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 0.01)
    optimizer.step()


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(mib: int, repeats: int, folder: Path, url: str, client: O3Client | None = None) -> dict[str, Any]:
    """Medians in seconds."""
    model, optimizer = training(mib)
    seconds: dict[str, list[float]] = {}

    def keep(name: str, work: Callable[[], Any]) -> None:
        seconds.setdefault(name, []).append(timed(work))

    def save_by_torch(number: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, folder / f"{number % 2}.pt")

    def save_by_torch_to_the_disk(number: int) -> None:
        save_by_torch(number)
        fsync_file(folder / f"{number % 2}.pt")

    def load_by_torch(number: int) -> None:
        state = torch.load(folder / f"{number % 2}.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    with O3CheckpointManager(url, client=client, key_file=folder / "key", cache_dir=folder / "cache") as checkpoints:
        for number in range(repeats):
            change(model, optimizer)
            keep("torch_save", lambda number=number: save_by_torch(number))
            keep("torch_load", lambda number=number: load_by_torch(number))
            change(model, optimizer)
            keep("torch_save_fsync", lambda number=number: save_by_torch_to_the_disk(number))
            change(model, optimizer)
            keep("sync", lambda: checkpoints.save_checkpoint(model, optimizer, 0, run_id="bench", wait=True))
            change(model, optimizer)
            started = time.perf_counter()
            keep("async", lambda: checkpoints.save_checkpoint(model, optimizer, 0, run_id="bench"))
            checkpoints.wait()
            seconds.setdefault("async_ready", []).append(time.perf_counter() - started)
            keep("load", lambda: checkpoints.load_checkpoint("bench", model=model, optimizer=optimizer))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "state_mib": mib,
        "repeats": repeats,
        "origin": url.partition("://")[0],
        "threads": torch.get_num_threads(),
        "median_s": {name: round(value, 4) for name, value in medians.items()},
        "min_s": {name: round(min(times), 4) for name, times in seconds.items()},
        "async_stall_to_torch_save": round(medians["async"] / medians["torch_save"], 3),
        "async_stall_to_sync": round(medians["async"] / medians["sync"], 3),
        "sync_to_torch_save": round(medians["sync"] / medians["torch_save"], 2),
        "sync_to_torch_save_fsync": round(medians["sync"] / medians["torch_save_fsync"], 2),
        "load_to_torch_load": round(medians["load"] / medians["torch_load"], 2),
    }


async def measure_s3(mib: int, repeats: int, folder: Path) -> dict[str, Any]:
    """The same with a SeaweedFS of this machine, its data in the folder."""
    async with running_s3(folder / "s3") as server:
        client = O3Client(
            endpoint=server.endpoint, access_key=server.access_key, secret_key=server.secret_key, backend="gateway"
        )
        return await asyncio.to_thread(measure, mib, repeats, folder, f"o3://{server.bucket}/checkpoints", client)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="of the model and its optimizer; default: 256")
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--folder", type=Path, help="where the files go; default: a folder of its own under $TMPDIR")
    parser.add_argument("--s3", action="store_true", help="measure a local S3 server too")
    parser.add_argument("--url", help="origin of the checkpoints; default: in --folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.folder) as name:
        folder = Path(name)
        found = [measure(args.mib, args.repeats, folder, args.url or f"file://{folder}/origin")]
        if args.s3:
            found.append(asyncio.run(measure_s3(args.mib, args.repeats, folder)))
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
