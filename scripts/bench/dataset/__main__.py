"""O3Dataset and StreamingShardDataset beside local files and other libraries' readers, over one local S3 server.

    python -m scripts.bench.dataset [--quick] [--rounds 5] [--workers 0] [--json OUT] [--peers-path DIR]

Random 64 KiB samples in 8 shards, read in order in batches of 32, as uint8 tensors, through a DataLoader. Each
measurement is a process of its own: what it imports beyond torch is timed by itself; "first batch" and samples/s count
from then on, opening, worker start and listing included. Cold: an empty cache folder, one epoch. Warm: the same folder
in a new process, 4 epochs. Contenders take turns, each round begins with another; medians. Peers are measured if
they can be imported, from DIR too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from node.cli.demo.s3_server import running_s3
from scripts.bench.dataset.ours import LOCAL, OURS, SAMPLE_BYTES, Job, publish_parquet, upload, write_local
from scripts.bench.dataset.peers import CACHELESS, PEERS, WRITERS, environment

ROOT = Path(__file__).resolve().parents[3]
WARM_EPOCHS = 4
TIMEOUT_S = 120
Figures = dict[str, dict[str, list[dict[str, float]]]]
"""By contender, "cold" or "warm": what each round found."""


def _child(what: str, job: Job) -> dict[str, float]:
    """Raises RuntimeError with the last lines that the process said."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.bench.dataset.child", what, json.dumps(asdict(job))],
        cwd=ROOT,
        env=os.environ | environment(job),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RuntimeError(f"{job.contender}, {what}: {said[-1] if said else f'ended with {done.returncode}'}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _try(what: str, job: Job) -> dict[str, float] | None:
    try:
        return _child(what, job)
    except (RuntimeError, subprocess.TimeoutExpired) as err:
        sys.stderr.write(f"left out: {err}\n")
        return None


def _present(base: Job) -> list[str]:
    """The peers that can be imported; says of the others how they are had."""
    found = []
    for name in PEERS:
        if _try("probe", replace(base, contender=name)) is None:
            sys.stderr.write(f"{name} is missing: pip install --target DIR {name}, then --peers-path DIR\n")
        else:
            found.append(name)
    return found


def _round(names: list[str], base: Job, folder: Path, figures: Figures) -> None:
    for name in names:
        cache = folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir()
        job = replace(base, contender=name, cache=str(cache))
        for kind, epochs in (("cold", 1), ("warm", WARM_EPOCHS)):
            found = _try("read", replace(job, epochs=epochs))
            if found is not None:
                figures[name][kind].append(found)


def _middle(figures: Figures, name: str, kind: str, what: str) -> float | None:
    values = [one[what] for one in figures[name][kind]]
    return statistics.median(values) if values else None


def _cell(value: float | None, unit: Callable[[float], str]) -> str:
    return "-" if value is None else unit(value)


def _table(figures: Figures) -> str:
    lines = [
        "| | import | first batch, cold | warm | samples/s, cold | warm | warm, to the same local files |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in figures:
        warm = _middle(figures, name, "warm", "samples_s")
        local = _middle(figures, LOCAL.get(name, "local files"), "warm", "samples_s")
        cells = [_cell(_middle(figures, name, "cold", "import_s"), lambda s: f"{s:.2f} s")]
        cells += [
            _cell(_middle(figures, name, kind, "first_s"), lambda s: f"{s * 1000:.0f} ms") for kind in ("cold", "warm")
        ]
        cells += [
            _cell(_middle(figures, name, kind, "samples_s"), lambda rate: f"{rate:,.0f}") for kind in ("cold", "warm")
        ]
        cells.append("-" if warm is None or local is None else f"{warm / local:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _goals(figures: Figures) -> list[str]:
    """Each goal with what was found, and whether it is reached."""
    lines = []
    peers = [name for name in figures if name in PEERS]
    for name in LOCAL:
        for what, words, better in (
            ("first_s", "first batch before any peer's", min),
            ("samples_s", "samples/s not below the best peer's", max),
        ):
            for kind in ("cold", "warm"):
                mine = _middle(figures, name, kind, what)
                theirs = [(value, peer) for peer in peers if (value := _middle(figures, peer, kind, what)) is not None]
                if mine is None or not theirs:
                    lines.append(f"- {name}, {kind}: {words}: not measured")
                    continue
                best, peer = better(theirs)
                ratio = best / mine if what == "first_s" else mine / best
                lines.append(f"- {name}, {kind}: {words}: {_verdict(ratio, 1.0)}: {ratio:.2f} times {peer}")
        mine = _middle(figures, name, "warm", "samples_s")
        local = _middle(figures, LOCAL[name], "warm", "samples_s")
        if mine and local:
            ratio = mine / local
            lines.append(f"- {name}, warm: 0.9 of {LOCAL[name]}: {_verdict(ratio, 0.9)}: {ratio:.2f}")
    return lines


def _verdict(ratio: float, goal: float) -> str:
    return "reached" if ratio >= goal else "missed"


async def _measure(settings: argparse.Namespace, samples: int, figures: Figures) -> None:
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        folder = Path(name)
        async with running_s3(folder / "weed") as server:
            base = Job(
                "",
                server.bucket,
                server.endpoint,
                server.access_key,
                server.secret_key,
                "",
                str(folder / "raw"),
                settings.shards,
                settings.batch_size,
                settings.workers,
                1,
                str(settings.peers_path.absolute()) if settings.peers_path else "",
            )
            await asyncio.to_thread(_measure_at, base, folder, settings.rounds, samples, figures)


def _measure_at(base: Job, folder: Path, rounds: int, samples: int, figures: Figures) -> None:
    paths = write_local(folder / "raw", base.shards, samples)
    upload(base, "raw", paths, folder / "raw")
    publish_parquet(base, paths, folder / "parquet")
    names = list(OURS)
    for name in _present(base):
        written = folder / f"written-{name}"
        written.mkdir()
        if name not in WRITERS or _try("write", replace(base, contender=name, cache=str(written))) is not None:
            names.append(name)
    figures |= {name: {"cold": [], "warm": []} for name in names}
    for step in range(rounds):
        at = step % len(names)
        _round(names[at:] + names[:at], base, folder, figures)
        sys.stderr.write(f"round {step + 1} of {rounds} done; load average {os.getloadavg()[0]:.1f}\n")


def main() -> None:
    """Measure; print a table, and the goals with whether they are reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=128, help="data in MiB")
    parser.add_argument("--quick", action="store_true", help="16 MiB, one round")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", type=Path, help="a file for every single figure")
    parser.add_argument(
        "--peers-path", type=Path, help="a folder of packages that are imported after the installed ones"
    )
    settings = parser.parse_args()
    if settings.quick:
        settings.mib, settings.rounds = 16, 1
    samples = (settings.mib << 20) // SAMPLE_BYTES // settings.shards * settings.shards
    figures: Figures = {}
    loads = [os.getloadavg()[0]]
    asyncio.run(_measure(settings, samples, figures))
    loads.append(os.getloadavg()[0])
    sys.stdout.write(f"{_table(figures)}\n\n" + "\n".join(_goals(figures)) + "\n\n")
    sys.stdout.write(
        f"Medians of {settings.rounds} rounds, {samples:,} samples of 64 KiB, {settings.workers} workers, "
        f"{os.cpu_count()} cores, load average {loads[0]:.1f} before and {loads[1]:.1f} after. Without a cache, "
        f"so that warm is cold again: {', '.join(CACHELESS)}.\n"
    )
    if settings.json:
        record: dict[str, Any] = {"load_average": loads, "samples": samples, "figures": figures}
        settings.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
