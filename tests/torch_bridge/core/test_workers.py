"""A worker whose training process is killed ends, whatever it is doing, and whenever that happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[3]
TRAINER = """
    import multiprocessing, os, sys, time
    from torch_bridge.core.workers import end_with_trainer

    def work(number, late):
        if late:
            print(os.getpid(), flush=True)
            while os.getppid() == multiprocessing.parent_process().pid:
                time.sleep(0.01)
        end_with_trainer()
        print("holds", os.getpid(), flush=True)
        time.sleep(3600)

    if __name__ == "__main__":
        start, late = sys.argv[1], sys.argv[2] == "late"
        workers = [multiprocessing.get_context(start).Process(target=work, args=(n, late)) for n in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(3600)
"""


class Begun(NamedTuple):
    """A training process."""

    workers: list[int]
    """Their process ids."""
    trainer: subprocess.Popen[bytes]
    said: Path
    """What the workers say."""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Callable[[str, str], Begun]]:
    """Starts a training process with two workers, and waits until both have said their process ids."""
    sessions: list[int] = []

    def begin(start: str, when: str) -> Begun:
        script, said = tmp_path / "trainer.py", tmp_path / "said"
        script.write_text(textwrap.dedent(TRAINER))
        with said.open("wb") as out:
            trainer = subprocess.Popen(
                [sys.executable, str(script), start, when],
                stdout=out,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
        sessions.append(trainer.pid)
        wait_until(lambda: said.read_text().count("\n") == 2, timeout_s=60)
        return Begun([int(line.split()[-1]) for line in said.read_text().splitlines()], trainer, said)

    yield begin
    for session in sessions:
        with suppress(ProcessLookupError):
            os.killpg(session, signal.SIGKILL)


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_workers_end_with_their_training_process(start: str, begun: Callable[[str, str], Begun]) -> None:
    workers, trainer, _ = begun(start, "early")
    assert all(is_alive(pid) for pid in workers), "as long as it lives, they do"
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not any(map(is_alive, workers)), timeout_s=20)


def test_a_worker_that_begins_after_its_training_process_ended_holds_nothing(
    begun: Callable[[str, str], Begun],
) -> None:
    """torch's watch takes the process that adopted it for its training process, and waits for ever."""
    workers, trainer, said = begun("fork", "late")
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not any(map(is_alive, workers)), timeout_s=20)
    assert "holds" not in said.read_text()
