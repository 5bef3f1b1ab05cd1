"""What is cut short on purpose: downloads, loads and generations, by CANCEL, by a client that leaves, by a signal."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol.errors import CancelledRequestError, NoSourceError, ShoalError, UnreachableError
from tests.support.daemons import Daemon, daemon
from tests.support.waiting import wait_until

UPLOAD_BYTES_S = 16_000_000
TASK = {"task_type": "ai_inference", "model": "smol", "prompt": "1 2 3 4", "max_tokens": 400, "stream": True}


@pytest.fixture(scope="module")
def slow_seed(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    home = tmp_path_factory.mktemp("slow")
    shutil.copytree(small_shards, home / "shards" / "smol")
    with daemon(home, "--upload-limit", str(UPLOAD_BYTES_S)) as node:
        wait_until(lambda: [file["state"] for file in node.files().values()] == ["seeding"] * 3)
        yield node


def asking(node: Daemon, method: str, params: dict[str, Any], **options: Any) -> Callable[[], Exception | None]:
    """Ask from a thread of its own; what is returned waits for the end and gives the error, if it was one."""
    failure: list[Exception] = []

    def run() -> None:
        try:
            node.call(method, params, **options)
        except ShoalError as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def ended() -> Exception | None:
        thread.join(10)
        assert not thread.is_alive()
        return failure[0] if failure else None

    return ended


def downloads(node: Daemon) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = node.call("STATUS")["downloads"]
    return found


def engines(node: Daemon) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for child in psutil.Process(node.process.pid).children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "node.pipeline.worker.main" in child.cmdline():
                found.append(child)
    return found


def moving(node: Daemon) -> bool:
    return any(one["bytes_done"] for one in downloads(node))


def test_a_download_keeps_to_the_limit_is_cancelled_and_holds_up_no_shutdown(slow_seed: Daemon, tmp_path: Path) -> None:
    with daemon(tmp_path / "b", bootstrap=slow_seed) as node:
        began = time.monotonic()
        fetched = node.call("FETCH_SHARD", {"model": "smol", "shard_id": 1})
        rate = fetched["bytes"] / (time.monotonic() - began)
        assert 0.1 * UPLOAD_BYTES_S < rate < 1.3 * UPLOAD_BYTES_S, f"{rate / 1e6:.1f} MB/s on loopback"

        large = {"model": "smol", "shard_id": 0}
        ended = asking(node, "LOAD_SHARD", large, request_id="waiting")
        wait_until(lambda: moving(node))
        (file,) = [file for file in node.files().values() if file["shard_id"] == 0]
        assert file["state"] == "downloading"
        assert node.call("CANCEL", {"request_id": "waiting"})["cancelled"] is True
        assert isinstance(ended(), CancelledRequestError)
        wait_until(lambda: downloads(node) == [])

        answer = node.call("LOAD_SHARD", large | {"wait": False}, request_id="not-waiting")
        assert answer["status"] == "loading"
        wait_until(lambda: moving(node))
        assert node.call("CANCEL", {"request_id": "not-waiting"})["cancelled"] is True
        wait_until(lambda: downloads(node) == [])
        assert node.call("CANCEL", {"request_id": "not-waiting"})["cancelled"] is False
        wait_until(lambda: "request not-waiting: cancelled" in node.log)

        assert node.call("FETCH_SHARD", large | {"wait": False})["status"] == "fetching"
        wait_until(lambda: moving(node))
        assert node.end() < 5
        assert node.process.returncode == 0


def test_a_load_that_nobody_waits_for_and_a_shutdown_in_the_middle_of_one(shards_copy: Path) -> None:
    with daemon(shards_copy) as node:
        assert node.call("LOAD_SHARD", {"model": "smol", "shard_id": 1, "wait": False})["status"] == "loading"
        wait_until(lambda: [stage["shards"] for stage in node.call("STATUS")["stages"]] == [[1]])
        again = node.call("LOAD_SHARD", {"model": "smol", "shard_id": 1, "wait": False})
        assert again["status"] == "loaded", "there is nothing to wait for"
        node.call("UNLOAD_SHARD", {"model": "smol", "shard_id": 1})
        wait_until(lambda: not engines(node))

        loading = threading.Event()
        ended = asking(node, "LOAD_SHARD", {"model": "smol", "shard_id": 0}, on_notification=_when("loading", loading))
        assert loading.wait(10)
        wait_until(lambda: bool(engines(node)))
        children = psutil.Process(node.process.pid).children(recursive=True)
        assert node.end() < 5
        assert node.process.returncode == 0
        assert isinstance(ended(), CancelledRequestError | UnreachableError)
        assert not [one for one in children if one.is_running()]


def _when(phase: str, event: threading.Event) -> Callable[[str, dict[str, Any]], None]:
    return lambda _, params: event.set() if params["phase"] == phase else None


@pytest.mark.parametrize("stuck", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_shutdown_in_the_middle_of_a_generation(shards_copy: Path, stuck: bool) -> None:
    """With an engine that does not end it takes longer, and a second signal cuts that short."""
    with daemon(shards_copy, "--assign", "smol:0,1,2") as node:
        wait_until(lambda: [len(stage["shards"]) for stage in node.call("STATUS")["stages"]] == [3])
        begun = threading.Event()
        ended = asking(node, "EXECUTE_TASK", TASK, on_notification=lambda *_: begun.set())
        assert begun.wait(20)
        assert engines(node)
        children = psutil.Process(node.process.pid).children(recursive=True)
        if stuck:
            engines(node)[0].suspend()
            node.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "shutting down" in node.log)
        assert node.end() < (3 if stuck else 5)
        assert node.process.returncode == (128 + signal.SIGTERM if stuck else 0)
        assert isinstance(ended(), CancelledRequestError | UnreachableError)
        assert not psutil.wait_procs(children, timeout=3)[1]
        assert "Traceback" not in node.log


@pytest.mark.slow
@pytest.mark.timeout(110)
def test_a_provider_that_died_is_named_in_time(slow_seed: Daemon, small_shards: Path, tmp_path: Path) -> None:
    """Its record outlives it, so it is still found; and the manifest is here, so only the shard is missing."""
    shutil.copytree(small_shards, tmp_path / "a" / "shards" / "smol")
    with daemon(tmp_path / "a") as first, daemon(tmp_path / "b", bootstrap=first) as node:
        node.call("FETCH_SHARD", {"model": "smol", "shard_id": 1})
        first.process.kill()
        first.process.wait(5)
        began = time.monotonic()
        with pytest.raises(NoSourceError) as caught:
            node.call("LOAD_SHARD", {"model": "smol", "shard_id": 0})
        assert time.monotonic() - began < 75
        assert f"127.0.0.1:{first.ports['bt']} (has it)" in caught.value.message
        assert caught.value.details["providers"] == {f"127.0.0.1:{first.ports['bt']}": True}
        assert node.call("STATUS")["downloads"] == []


def test_a_crash_of_a_native_library_leaves_in_the_log_what_the_threads_were_in(tmp_path: Path) -> None:
    with daemon(tmp_path / "a") as node:
        resource.prlimit(node.process.pid, resource.RLIMIT_CORE, (0, 0))  # no dump in whatever folder this is
        node.end(signal.SIGSEGV)
        assert node.process.returncode == -signal.SIGSEGV
        assert "Segmentation fault" in node.log
        assert "node/cli/serve.py" in node.log
