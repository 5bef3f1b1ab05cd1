"""A StreamingBatchDataset run with DataLoader workers, killed at random moments, and what the next run makes of it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.bridge.batches import SIZE, bodies, bytes_here, folder_of, sampled
from torch_bridge.batches.plan import Consumer, RemoteFile, epoch_order, own_share

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FILES = bodies(60)
WORKERS = 2
AHEAD = 6
"""(prefetch_factor + 1) x batch_size: of each worker."""
MAX_BYTES = 10 * SIZE
KILLS = 2
ROOT = Path(__file__).parents[3]

# What was used is said after it was used, as a training step would.
CHILD = """
    import sys, time
    from pathlib import Path
    from torch.utils.data import DataLoader
    from tests.support.bridge.batches import SIZE, dataset, only_name
    from torch_bridge import O3Client

    if __name__ == "__main__":
        url, cache, start = sys.argv[1:]
        files = dataset(
            O3Client().at(url), Path(cache), cache_size=8, max_bytes=10 * SIZE, decode=only_name, samples_ahead=6
        )
        files.set_epoch(0)
        loader = DataLoader(files, batch_size=2, num_workers=2, multiprocessing_context=start)
        for batch in loader:
            time.sleep(0.04)
            for name in batch:
                print(name, flush=True)
        print("END", flush=True)
"""


def begun(script: Path, origin: Any, cache: Path, start: str, said: Path) -> subprocess.Popen[bytes]:
    # Into a file: a pipe would not end before the workers that are left behind.
    with said.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, str(script), origin.url, str(cache), start],
            stdout=out,
            cwd=ROOT,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )


def lines_of(said: Path) -> list[str]:
    """What was said in whole lines."""
    return said.read_text().rpartition("\n")[0].split()


def alive_in(group: int) -> list[int]:
    """Processes of a session that run still."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(("start", "whole_group"), [("fork", False), ("fork", True), ("spawn", False)])
def test_workers_and_a_kill_at_a_random_moment(start: str, whole_group: bool, tmp_path: Path) -> None:
    """The parent alone: its workers are left behind, and hold their part of the folder until they notice."""
    seed = int(os.environ.get("SHOAL_TEST_SEED", random.randrange(10**6)))
    print(f"SHOAL_TEST_SEED={seed}")
    pick = random.Random(seed)
    origin, cache = folder_of(tmp_path / "origin", FILES), tmp_path / "cache"
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(CHILD))
    runs: list[list[str]] = []
    children: list[subprocess.Popen[bytes]] = []
    said = [tmp_path / f"run{number}.txt" for number in range(KILLS + 1)]
    with sampled(cache) as sizes:
        for number in range(KILLS):
            child = begun(script, origin, cache, start, said[number])
            children.append(child)
            enough, until = pick.randrange(1, 16), time.monotonic() + 60
            while len(lines_of(said[number])) < enough and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(pick.random() * 0.2)
            (os.killpg if whole_group else os.kill)(child.pid, signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
            runs.append(lines_of(said[number]))
            assert runs[-1]
            assert "END" not in runs[-1]
        last = begun(script, origin, cache, start, said[KILLS])
        children.append(last)
        assert last.wait(timeout=200) == 0
    *rest, end = lines_of(said[KILLS])
    assert end == "END"
    runs.append(rest)

    names = {key.rpartition("/")[2] for key in FILES}
    times = Counter(name for run in runs for name in run)
    assert set(times) <= names
    assert [max(Counter(run).values(), default=0) for run in runs] == [1] * len(runs), "never twice in one run"
    # Lost are at most samples that lay in the loader's queues when a worker had come to the end of its share.
    listed = [RemoteFile(info.key, info.size, (info.etag or "").strip('"')) for info in origin.list()]
    order = epoch_order(listed, 0, 0)
    shares = [own_share(order, Consumer(number, WORKERS, number, WORKERS)) for number in range(WORKERS)]
    last_ones = {file.key.rpartition("/")[2] for share in shares for file in share[-AHEAD:]}
    assert names - set(times) <= last_ones
    # Given again are at most those in the queues, and the one in hand, of each worker at each kill.
    again = sum(count - 1 for count in times.values())
    assert again <= KILLS * WORKERS * (AHEAD + 1)
    assert max(size for size, _ in sizes) <= MAX_BYTES
    until = time.monotonic() + 30
    while any(alive_in(child.pid) for child in children) and time.monotonic() < until:
        time.sleep(0.1)
    assert not [pid for child in children for pid in alive_in(child.pid)], "no worker is left behind"
    assert bytes_here(cache) == (0, 0)
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 20_000]
