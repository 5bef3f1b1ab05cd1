"""`python -m node demo` as a person runs it: to its end, and interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from node.cli.demo import command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(110)]


@contextmanager
def running_demo(home: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A demo whose temporary folder is below `home`, in a session of its own as under a terminal."""
    environment = os.environ | {"TMPDIR": str(home), "COLUMNS": "80", "PYTHONUNBUFFERED": "1"}
    with (home / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "node", "demo", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)


def said(home: Path) -> str:
    return (home / "output.txt").read_text(errors="replace")


def left_behind(home: Path) -> list[str]:
    """Processes whose command line names the demo's folder, and what lies in it."""
    processes = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(home) in line and process.pid != os.getpid():
            processes.append(line)
    return processes + [str(path) for path in home.glob("shoal-demo-*")]


def test_a_short_demo_succeeds_and_cleans_up(tmp_path: Path) -> None:
    with running_demo(tmp_path, "--max-tokens", "3", "--prompt", "Say [/hi] twice.") as process:
        assert process.wait(100) == 0, said(tmp_path)
    output = said(tmp_path)
    assert output.rstrip().endswith("tokens identical to one process: yes")
    assert "> Say [/hi] twice." in output
    assert re.search(r"alpha +0 .* local ", output)
    assert re.search(r"beta +1 .* peers +\d+\.\d", output)
    assert re.search(r"time to first token \d+ ms", output)
    _, _, second = output.partition("Stop alpha")
    assert re.search(r"beta +shard 1 loaded, from origin ", second)
    assert re.search(r"source: origin, [1-9]\d*\.\d MiB.*, ready after \d", second)
    assert left_behind(tmp_path) == []


def test_tokens_that_differ_are_told_and_the_exit_status_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = command._reference
    asked: list[list[int]] = []

    async def other_at_the_end(*arguments: Any) -> dict[str, Any]:
        found = await real(*arguments)
        asked.append(found["tokens"])
        return found | {"tokens": [*found["tokens"][:-1], found["tokens"][-1] + 1]}

    monkeypatch.setattr(command, "_reference", other_at_the_end)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        command.demo(model_gguf=None, prompt="Hi", max_tokens=3)
    output = capsys.readouterr().out
    assert ended.value.code == 1
    assert output.rstrip().endswith("tokens identical to one process: no")
    ((first, second, third),) = asked
    assert f"pipeline    [{first}, {second}, {third}]" in output
    assert f"one process [{first}, {second}, {third + 1}]" in output
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("until", "max_tokens"),
    [
        ("Cut", 3),
        ("Start three nodes", 3),
        ("rpc 127.0.0.1", 3),
        ("EXECUTE_TASK: a chat", 300),
        ("The same by one", 300),
        ("Publish the shards", 3),
        ("Stop alpha", 3),
    ],
)
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, until: str, max_tokens: int) -> None:
    with running_demo(tmp_path, "--max-tokens", str(max_tokens)) as process:
        deadline = time.monotonic() + 60
        while until not in said(tmp_path):
            assert process.poll() is None, said(tmp_path)
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 130, said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    assert "the nodes are stopped" in said(tmp_path)
    assert "tokens identical" not in said(tmp_path)
    assert left_behind(tmp_path) == []


def test_a_killed_demo_takes_its_nodes_along(tmp_path: Path) -> None:
    with running_demo(tmp_path) as process:
        while "LOAD_SHARD on each" not in said(tmp_path):
            assert process.poll() is None, said(tmp_path)
            time.sleep(0.05)
        process.kill()
        process.wait(10)
    deadline = time.monotonic() + 10
    while [one for one in left_behind(tmp_path) if "python" in one]:
        assert time.monotonic() < deadline, left_behind(tmp_path)
        time.sleep(0.1)


def test_a_demo_of_a_model_that_is_none_fails_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"GGUF\x03 nothing")
    with running_demo(tmp_path, "--model-gguf", str(tmp_path / "junk.gguf")) as process:
        assert process.wait(30) == 1
    assert "error (invalid_shard): junk.gguf" in said(tmp_path)
    assert "Traceback" not in said(tmp_path)
    assert left_behind(tmp_path) == []
