"""scripts.base_train as it is started: it streams, evaluates, and goes on from a state as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.base_train_settings import Settings, accumulation, evaluation_batches, parsed, shards_needed

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--depth=1", "--max_seq_len=64", "--device_batch_size=1", "--total_batch_size=128", "--eval_tokens=128")


def settings(*flags: str) -> Settings:
    return parsed(flags, "", Path("unused"))


def started(*flags: str) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    command = [sys.executable, "-m", "scripts.base_train", "--json", "--log_every=1", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()], done


def losses(events: list[dict[str, Any]]) -> list[float]:
    return [event["loss"] for event in events if event["event"] in ("step", "evaluation")]


def test_the_steps_of_accumulation_come_out_even() -> None:
    flags = ("--max_seq_len=512", "--device_batch_size=2", "--total_batch_size=8192", "--eval_tokens=3000")
    assert accumulation(settings(*flags), 4) == 2
    assert evaluation_batches(settings(*flags), 2) == 2
    with pytest.raises(ValueError, match="take 6144"):
        accumulation(settings(*flags), 3)


def test_as_many_shards_as_the_tokens_take() -> None:
    assert shards_needed([100] * 10, 250, 5) == 3
    assert shards_needed([100] * 10, 300, 5) == 4  # the count is an estimate: a twentieth is to spare
    assert shards_needed([100] * 10, 10_000, 5) == 5
    assert shards_needed([100] * 3, 10_000, 5) == 3


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--core_metric_every=100", "CORE metric needs"),
        ("--streaming_mode=yes", "True or False"),
        ("--num_iterations=0", "at least 1"),
        ("--save_every=0", "at least 1"),
    ],
)
def test_a_wrong_flag_says_why(flag: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        settings(flag)
    assert why in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_streams_and_goes_on_from_a_state(tmp_path: Path) -> None:
    flags = (*SMALL, "--num_iterations=40", f"--folder={tmp_path}", f"--save={tmp_path / 'states'}", "--save_every=15")
    whole, done = started(*flags)
    assert done.returncode == 0, done.stderr
    start = whole[0]
    assert start["event"] == "start"
    assert start["micro_batches"] == 2
    assert 1 < len(start["shards"]) <= 5
    status = next(event for event in whole if event["event"] == "streaming")
    assert status["bytes_by_source"]["origin"] > 0
    assert losses(whole)[0] == pytest.approx(5.55, abs=0.01)  # ln 257: it begins knowing nothing
    assert losses(whole)[-2] < 5
    again, done = started(*flags, f"--resume={tmp_path / 'states' / 'step_00015.pt'}")
    assert done.returncode == 0, done.stderr
    assert losses(again) == losses(whole)[15:]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_folder_without_a_window_gives_the_same_losses(tmp_path: Path) -> None:
    flags = (*SMALL, "--num_iterations=8", f"--folder={tmp_path}")
    streamed, done = started(*flags)
    assert done.returncode == 0, done.stderr
    read, done = started(*flags, "--streaming_mode=False")
    assert done.returncode == 0, done.stderr
    assert losses(read) == losses(streamed)
    (made,) = tmp_path.glob("python-library-*")
    assert not list((made / "parquet").glob(".*")), "a folder that is only read is not written to"


def test_a_source_that_is_not_there_is_one_line() -> None:
    events, done = started(*SMALL, "--source=/nowhere/at/all")
    assert done.returncode == 1
    assert not events
    assert done.stderr.startswith("base_train: /nowhere/at/all is neither")
    assert "Traceback" not in done.stderr
