"""One measurement of scripts.bench.dataset, in a process of its own: reads a Job as JSON, prints what it found as JSON.

python -m scripts.bench.dataset.child read|write|probe JSON
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from pathlib import Path

import torch  # counted for nobody: each of them needs it
import torch.utils.data

from scripts.bench.dataset.ours import OURS, SAMPLE_BYTES, Job, upload
from scripts.bench.dataset.peers import PEERS, WRITERS

CONTENDERS = OURS | PEERS


def _import(job: Job) -> float:
    """Seconds."""
    if job.peers_path:
        own = Path(job.peers_path, job.contender)
        if own.is_dir():  # for one whose dependencies do not agree with those installed
            sys.path.insert(0, str(own))
        sys.path.append(job.peers_path)
    began = time.perf_counter()
    for module in CONTENDERS[job.contender][0]:
        importlib.import_module(module)
    return time.perf_counter() - began


def _read(job: Job) -> dict[str, float]:
    import_s = _import(job)
    gc.freeze()  # else a full collection goes through all that torch made: 250 ms, for whom it happens to
    began = time.perf_counter()
    batches = CONTENDERS[job.contender][1](job)
    first_s, samples = 0.0, 0
    for epoch in range(job.epochs):
        for batch in batches(epoch):
            if not samples:
                first_s = time.perf_counter() - began
            if batch.dtype != torch.uint8 or batch.shape[1:] != (SAMPLE_BYTES,):
                raise SystemExit(f"{job.contender} gave a batch of {batch.dtype} {tuple(batch.shape)}")
            samples += len(batch)
    seconds = time.perf_counter() - began
    return {"import_s": import_s, "first_s": first_s, "samples": samples, "samples_s": samples / seconds}


def _write(job: Job) -> dict[str, float]:
    _import(job)
    prefix, write = WRITERS[job.contender]
    out = Path(job.cache)
    write(job, out)
    upload(job, prefix, sorted(path for path in out.rglob("*") if path.is_file()), out)
    return {}


def main() -> None:
    what, words = sys.argv[1:]
    job = Job(**json.loads(words))
    if what == "probe":
        found = {"import_s": _import(job)}
    else:
        found = _write(job) if what == "write" else _read(job)
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
