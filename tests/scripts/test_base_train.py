"""scripts.base_train as it is started: it streams, evaluates, and goes on from a state as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from node.cli.demo.s3_server import running_s3
from scripts.base_train.__main__ import main
from scripts.base_train.corpus import NAME, write_shards
from scripts.base_train.settings import Settings, accumulation, evaluation_batches, parsed, shards_needed
from tests.support.daemons import daemon, shoal
from tests.support.ports import free_port
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--depth=1", "--max_seq_len=64", "--device_batch_size=1", "--total_batch_size=128", "--eval_tokens=128")


def settings(*flags: str) -> Settings:
    return parsed(flags, "", Path("unused"))


def started(
    *flags: str, ranks: int = 1, environment: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], subprocess.CompletedProcess[str]]:
    run = ["-m", "scripts.base_train", "--json", "--log_every=1", "--threads=1", *flags]
    if ranks > 1:
        where = [f"--nproc_per_node={ranks}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        run = ["-m", "torch.distributed.run", *where, *run]
    more = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | (environment or {})
    done = subprocess.run(
        [sys.executable, *run],
        cwd=ROOT,
        env=os.environ | more,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
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


def test_a_source_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert main([*SMALL, "--json", "--source=/nowhere/at/all"]) == 1
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("base_train: /nowhere/at/all is neither")
    assert "Traceback" not in said.err


def places(path: Path) -> list[dict[str, Any]]:
    return list(torch.load(path, weights_only=True)["places"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_train_one_model_on_documents_of_their_own_and_one_goes_on(tmp_path: Path) -> None:
    states = tmp_path / "states"
    flags = (*SMALL, "--num_iterations=10", f"--folder={tmp_path}", f"--save={states}", "--save_every=5")
    two, done = started(*flags, ranks=2)
    assert done.returncode == 0, done.stderr  # saving refuses weights that differ
    assert (two[0]["world"], two[0]["micro_batches"]) == (2, 1)
    assert losses(two)[9] < losses(two)[0] - 0.5
    first, second = places(states / "step_00005.pt")
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["next_tokens"] != second["next_tokens"]
    same, done = started(*flags, f"--resume={states / 'step_00005.pt'}", ranks=2)
    assert done.returncode == 0, done.stderr
    assert losses(same) == losses(two)[5:]
    alone, done = started(*flags, f"--resume={states / 'step_00005.pt'}")
    assert done.returncode == 0, done.stderr
    assert [event["step"] for event in alone if event["event"] == "step"] == [6, 7, 8, 9, 10]
    assert losses(alone)[4] < losses(two)[4]
    (place,) = places(states / "step_00010.pt")
    assert place["dataset"]["ranks"] == 1


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_shards_come_from_this_machines_node(tmp_path: Path) -> None:
    home = tmp_path / "seed"
    write_shards(tmp_path / "set", shards=3, shard_bytes=6000)
    assert shoal("publish", str(tmp_path / "set"), "--name", NAME, "--data-dir", str(home)).returncode == 0
    with daemon(home) as seed, daemon(tmp_path / "trainer", bootstrap=seed) as node:
        wait_until(lambda: [file["state"] for file in seed.files().values()] == ["seeding"] * 3)
        source = (f"--source=127.0.0.1:{node.ports['rpc']}", f"--dataset={NAME}", f"--folder={tmp_path / 'run'}")
        events, done = started(*SMALL, "--num_iterations=5", *source)
        assert done.returncode == 0, done.stderr
        assert losses(events)[4] < losses(events)[0]
        status = next(event for event in events if event["event"] == "streaming")
        assert set(status["bytes_by_source"]) == {"peers"}


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_shards_come_straight_from_s3(tmp_path: Path) -> None:
    write_shards(tmp_path / "set", shards=3, shard_bytes=6000)
    async with running_s3(tmp_path / "s3") as s3:
        keys = {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": s3.secret_key}
        url = f"s3://{s3.bucket}/text"
        command = [sys.executable, "-m", "node", "publish", str(tmp_path / "set"), "--name", NAME, "--only-origin"]
        command += ["--origin", url, "--s3-endpoint", s3.endpoint, "--data-dir", str(tmp_path / "publisher")]
        said = {"cwd": ROOT, "env": os.environ | keys, "check": True, "capture_output": True, "timeout": 60}
        await asyncio.to_thread(subprocess.run, command, **said)
        flags = (*SMALL, "--num_iterations=5", f"--dataset={NAME}", f"--folder={tmp_path / 'run'}")
        there = keys | {"AWS_ENDPOINT_URL_S3": s3.endpoint}
        events, done = await asyncio.to_thread(started, *flags, f"--source={url}", environment=there)
        assert done.returncode == 0, done.stderr
        assert losses(events)[4] < losses(events)[0]
        assert next(event for event in events if event["event"] == "streaming")["bytes_by_source"]["origin"] > 0
        there = {
            "AKAVE_O3_ACCESS_KEY": s3.access_key,
            "AKAVE_O3_SECRET_KEY": s3.secret_key,
            "SHOAL_O3_ENDPOINT": s3.endpoint,
        }
        url = f"o3://{s3.bucket}/text"
        again, done = await asyncio.to_thread(started, *flags, f"--source={url}", environment=there)
        assert done.returncode == 0, done.stderr
        assert losses(again) == losses(events)
