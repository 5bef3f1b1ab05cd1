"""examples/train_mnist.py as a user starts it: killed at random steps and started again, it ends at the same bits."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from node.cli.demo.s3_server import S3Server
from tests.support.origins.s3_server import credentials, s3_server
from torch_bridge import O3Client

PROGRAM = Path(__file__).parents[2] / "examples" / "train_mnist.py"
TRAIN, TEST = 6_000, 500
BATCH, EPOCHS, EVERY = 32, 2, 23
LONGEST_S = 120.0
STEPS = -(-TRAIN // BATCH) * EPOCHS


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of noisy pictures in MNIST's format, the training files gzipped."""
    folder, draw = tmp_path_factory.mktemp("idx"), np.random.default_rng(4)
    classes = draw.integers(0, 256, (10, 28, 28))
    for name, count in (("train", TRAIN), ("t10k", TEST)):
        labels = draw.integers(0, 10, count).astype(np.uint8)
        images = ((classes[labels] + draw.integers(0, 512, (count, 28, 28))) // 3).astype(np.uint8)
        for kind, axes, values in (("images", 3, images), ("labels", 1, labels)):
            shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
            data = bytes((0, 0, 8, axes)) + shape + values.tobytes()
            path = folder / f"{name}-{kind}-idx{axes}-ubyte"
            if name == "train":
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data, 1))
            else:
                path.write_bytes(data)
    return folder


class Program:
    """The program against one server, with a key and a folder of the test's own."""

    def __init__(self, weed: S3Server, folder: Path, files: Path) -> None:
        self.work, self._folder, self._files = folder / "work", folder, files
        self._env = os.environ | credentials(weed)

    def start(self, run: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(sys.executable, str(PROGRAM), "--url", "o3://shards/mnist", "--run", run, "--json"),
                *("--data", str(self._files), "--work", str(self.work), "--key", str(self._folder / "key")),
                *("--epochs", str(EPOCHS), "--batch-size", str(BATCH), "--checkpoint-every", str(EVERY), *more),
            ],
            env=self._env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def to_the_end(self, run: str, *more: str) -> dict[str, Any]:
        out, err, code = self.ended(self.start(run, *more))
        assert code == 0, err
        return dict(json.loads(out))

    def ended(self, process: subprocess.Popen[str]) -> tuple[str, str, int]:
        """What it printed, what it said on standard error, and its exit code."""
        try:
            out, err = process.communicate(timeout=LONGEST_S)
        finally:
            process.kill()
        return out, err, process.returncode

    def killed_at(self, run: str, step: int) -> None:
        """Started, and killed as soon as its curve has this step."""
        process = self.start(run)
        try:
            while self.steps(run)[-1:] < [step]:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.005)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert self.steps(run)[-1] < STEPS

    def steps(self, run: str) -> list[int]:
        """Those in the curve, whose last line may be half-written."""
        lines = self.curve(run).split(b"\n")[:-1]
        return [json.loads(line)["step"] for line in lines]

    def curve(self, run: str) -> bytes:
        path = self.work / run / "loss.jsonl"
        return path.read_bytes() if path.exists() else b""

    def weights(self, run: str) -> bytes:
        return (self.work / run / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_run_that_is_killed_at_random_steps_ends_as_one_that_is_not(
    weed: S3Server, files: Path, tmp_path: Path
) -> None:
    program = Program(weed, tmp_path, files)
    whole = program.to_the_end("whole")
    assert whole["test_accuracy"] > 0.9
    assert program.steps("whole") == list(range(1, STEPS + 1))

    kills = [random.randrange(start, start + STEPS // 5) for start in (1, STEPS // 2)]
    print("killed at", kills)
    for step in kills:
        program.killed_at("killed", step)
    killed = program.to_the_end("killed")

    assert killed["went_on_after_step"] > 0, "no checkpoint was found, and nothing was shown"
    assert program.curve("killed") == program.curve("whole")
    assert program.weights("killed") == program.weights("whole")
    assert killed["test_accuracy"] == whole["test_accuracy"]

    again = program.to_the_end("killed")  # nothing is left to do, and the result is there again
    assert again["went_on_after_step"] == STEPS
    assert again["weights_sha256"] == whole["weights_sha256"]

    _, said, code = program.ended(program.start("killed", "--lr", "0.1"))
    assert code == 1
    assert "was begun with lr 0.003, now 0.1" in said


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_local_alone_makes_its_data_and_learns_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "--local", "--json", "--work", tmp_path, "--key", tmp_path / "key", "--epochs", "4"],
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"digits are made in {tmp_path / 'digits'}" in done.stderr or Path("/usr/share/datasets").exists()
    result = json.loads(done.stdout)
    assert result["test_accuracy"] > 0.8
    assert result["steps"] == 4 * 47


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The program as a module, on a machine without Fashion-MNIST."""
    monkeypatch.syspath_prepend(PROGRAM.parent)
    module = importlib.import_module("train_mnist")
    monkeypatch.setattr(module, "FASHION_MNIST", tmp_path / "fashion-mnist")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_where_no_data_is_found_digits_are_made_and_learnt(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, url = tmp_path / "work", (tmp_path / "origin").as_uri()
    command = ["train_mnist.py", "--local", "--work", str(work), "--key", str(tmp_path / "key"), "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", command)
    wanted = example._arguments()
    with O3Client() as client:
        result = example.train(wanted, client, url)
        told = capsys.readouterr().err
        assert f"{tmp_path / 'fashion-mnist'} has no data: digits are made in {work / 'digits'}" in told
        assert result["test_accuracy"] > 0.3, "of ten classes, after one epoch"
        assert (result["steps"], result["went_on_after_step"]) == (47, 0)
        made = {path.name: path.read_bytes() for path in (work / "digits").iterdir()}
        assert len(made) == 4
        assert example.train(wanted, client, url)["went_on_after_step"] == 47, "the data is there by now"
        assert "digits" not in capsys.readouterr().err
    again = example.make_digits(tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == made
    for name in made:
        (tmp_path / "fashion-mnist").mkdir(exist_ok=True)
        (tmp_path / "fashion-mnist" / name).write_bytes(made[name])
    assert example.found_or_made(tmp_path / "other") == tmp_path / "fashion-mnist"
