"""One daemon as a person runs it: start, ready line, files, commands, shutdown."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import pytest

from node.formats.split import split_gguf
from protocol.errors import (
    AmbiguousNameError,
    InsufficientMemoryError,
    InvalidParamsError,
    ShardNotFoundError,
    UnknownNameError,
    WrongNodeError,
)
from tests.support.daemons import Daemon, daemon
from tests.support.gguf.tiny_gguf import write_tiny_gguf
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A node without files, for tests that leave it as it is."""
    with daemon(tmp_path_factory.mktemp("empty")) as node:
        yield node


@pytest.fixture(scope="module")
def node(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A node with the shards of `smol`, half a model and no parquet; tests take away again what they add."""
    home = tmp_path_factory.mktemp("seed")
    shards = home / "shards"
    shutil.copytree(small_shards, shards / "smol")
    whole = (shards / "smol" / "shard-1.gguf").read_bytes()
    (shards / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (shards / "junk.parquet").write_bytes(b"PAR1 nothing PAR1")
    with daemon(home) as node:
        wait_until(lambda: len(node.files()) == 5 and "hashing" not in {f["state"] for f in node.files().values()})
        yield node


def test_ready_line_health_status_and_clean_end(tmp_path: Path) -> None:
    with daemon(tmp_path / "a") as node:
        assert set(node.ports) == {"rpc", "dht", "bt", "http"}
        assert all(node.ports.values())
        status = node.call("STATUS")
        assert status["node_id"] == node.node_id
        assert status["cluster"] == "default"
        assert status["versions"]["libtorrent"].startswith("2.1")
        base = f"http://127.0.0.1:{node.ports['http']}"
        with urllib.request.urlopen(f"{base}/healthz") as answer:
            assert json.load(answer)["node_id"] == node.node_id
        with urllib.request.urlopen(f"{base}/metrics") as answer:
            assert b"shoal_uptime_seconds" in answer.read()
        assert stat.S_IMODE((node.home / "node.key").stat().st_mode) == 0o600
        assert node.end(signal.SIGINT) < 5
        assert node.process.returncode == 0
        assert node.process.stdout is not None
        assert node.process.stdout.read() == b"", "the ready line is the only line on stdout"
    config = tmp_path / "shoal.toml"
    config.write_text('cluster = "file"\nthreads = 7\nlog_level = "debug"\n')
    with daemon(tmp_path / "a", "--config", str(config), SHOAL_CLUSTER="environment", SHOAL_CLUSTRE="x") as again:
        assert again.node_id == node.node_id, "the key is kept"
        status = again.call("STATUS")
        assert status["cluster"] == "environment", "stands over the file"
        assert status["threads"] == 1, "the helper's flag stands over the file"
        assert " DEBUG " in again.log, "the file stands over the default"
        assert "SHOAL_CLUSTRE is not a setting" in again.log


def test_loopback_alone_and_a_data_dir_of_ones_own(empty: Daemon) -> None:
    node = empty
    listening = _listening_addresses(node.process.pid)
    assert listening, "no socket was found: the test sees nothing"
    assert {host for host, port in listening} == {"127.0.0.1"}
    command = [sys.executable, "-m", "node", "--data-dir", str(node.home), "--rpc-port", "0"]
    second = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert second.returncode == 1
    assert f"process {node.process.pid}" in second.stderr.decode()


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    """All four at once: each process takes its time to start."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda which: _is_named(tmp_path / which, which), ["rpc", "dht", "bt", "http"]))


def _is_named(home: Path, which: str) -> None:
    kind = socket.SOCK_DGRAM if which == "dht" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if which != "dht":
            taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "node", "--data-dir", str(home)]
        for one in ("rpc", "dht", "bt", "http"):
            command += [f"--{one}-port", str(port if one == which else 0)]
        ended = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout) == (1, b"")
    assert f"listen on 127.0.0.1:{port}" in ended.stderr.decode() or f"127.0.0.1:{port}:" in ended.stderr.decode()
    assert ended.stderr.count(b"\n") == 1, "one line, no traceback"


def test_listening_beyond_loopback_needs_consent_and_warns_at_every_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "node", "--data-dir", str(tmp_path / "b"), "--listen", "0.0.0.0"]
    refused = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert refused.returncode == 2
    assert b"--insecure-listen" in refused.stderr
    assert not (tmp_path / "b").exists()
    for start in (1, 2):
        with daemon(tmp_path / "a", "--listen", "0.0.0.0", "--insecure-listen") as node:
            assert node.log.count("listening on 0.0.0.0 without a cluster identity") == start
            (here,) = node.call("NODES")["nodes"]
            assert here["host"] != "0.0.0.0", "others cannot reach that"


def test_another_loopback_address_needs_no_consent(tmp_path: Path) -> None:
    with daemon(tmp_path / "a", "--listen", "127.0.0.2") as node:
        assert "without a cluster identity" not in node.log
        (here,) = node.call("NODES", host="127.0.0.2")["nodes"]
        assert here["host"] == "127.0.0.2"


def test_files_are_seeded_and_broken_ones_named(node: Daemon) -> None:
    files = node.files()
    assert len(files) == 5
    assert {files[f"smol/shard-{i}.gguf"]["state"] for i in range(3)} == {"seeding"}
    assert files["smol/shard-1.gguf"]["model"] == "smol"
    assert files["smol/shard-1.gguf"]["shard_id"] == 1
    for name in ("cut.gguf", "junk.parquet"):
        assert files[name]["state"] == "invalid"
        assert files[name]["error"]
        assert files[name].get("info_hash") is None
    shards = node.home / "shards"
    shutil.copyfile(shards / "smol" / "shard-1.gguf", shards / ".late.tmp")
    (shards / ".late.tmp").rename(shards / "late.gguf")
    wait_until(lambda: node.files().get("late.gguf", {}).get("state") == "seeding")
    (shards / "late.gguf").unlink()
    wait_until(lambda: "late.gguf" not in node.files())


def test_load_unload_and_errors(node: Daemon) -> None:
    progress: list[dict[str, object]] = []
    loaded = node.call(
        "LOAD_SHARD",
        {"model": "smol", "shard_id": 1},
        request_id="mine",
        on_notification=lambda _, params: progress.append(params),
    )
    assert loaded["status"] == "loaded"
    assert loaded["source"] == "local"
    assert Path(loaded["path"]).is_file()
    assert {one["request_id"] for one in progress} == {"mine"}
    assert node.call("LOAD_SHARD", {"shard_id": 1})["shard_id"] == 1, "the only model needs no name"
    assert node.files()["smol/shard-1.gguf"]["state"] == "loaded"
    stages = node.call("STATUS")["stages"]
    assert [stage["shards"] for stage in stages] == [[1]]
    assert node.call("UNLOAD_SHARD", {"model": "smol", "shard_id": 1})["status"] == "unloaded"
    assert node.files()["smol/shard-1.gguf"]["state"] == "seeding"

    with pytest.raises(UnknownNameError, match="nothing-like-it"):
        node.call("LOAD_SHARD", {"model": "nothing-like-it", "shard_id": 0})
    with pytest.raises(ShardNotFoundError, match="0 to 2"):
        node.call("LOAD_SHARD", {"model": "smol", "shard_id": 7})
    with pytest.raises(InvalidParamsError, match="shard_id"):
        node.call("LOAD_SHARD", {"model": "smol", "shard_id": "one"})
    with pytest.raises(WrongNodeError):
        node.call("STATUS", recipient="ab" * 32)


@pytest.fixture
def second_model(node: Daemon, tmp_path: Path) -> Iterator[Path]:
    """The folder of a small model `two` of two shards, there for one test."""
    folder = node.home / "shards" / "two"
    split_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"), folder, shards=2, name="two")
    both = {"two/shard-0.gguf", "two/shard-1.gguf"}
    wait_until(lambda: {name for name, file in node.files().items() if file["state"] == "seeding"} >= both)
    yield folder
    shutil.rmtree(folder)
    wait_until(lambda: not [name for name in node.files() if name.startswith("two/")])


def test_selectors_ambiguity_and_evict(node: Daemon, second_model: Path) -> None:
    with pytest.raises(AmbiguousNameError) as caught:
        node.call("FETCH_SHARD", {"filename": "shard-0.gguf"})
    assert len(caught.value.details["candidates"]) == 2
    with pytest.raises(AmbiguousNameError) as caught:
        node.call("LOAD_SHARD", {"shard_id": 0})
    content_id = node.files()["two/shard-1.gguf"]["content_id"]
    found = node.call("FETCH_SHARD", {"content_id": content_id})
    assert (found["status"], found["source"], found["shard_id"]) == ("fetched", "local", 1)
    digest = node.call("GET_MANIFEST", {"model": "two"})["digest"]
    again = node.call("GET_MANIFEST", {"model": f"two@{digest[:12]}"})
    assert again["signed"]["publisher"] == node.node_id
    evicted = node.call("EVICT_SHARD", {"model": "two", "shard_id": 1})
    assert evicted["status"] == "evicted"
    assert not Path(evicted["path"]).exists()
    wait_until(lambda: "two/shard-1.gguf" not in node.files())


def test_verify_shard_finds_a_changed_file(node: Daemon, second_model: Path) -> None:
    task = {"task_type": "verify_shard", "model": "two", "shard_id": 1}
    assert node.call("EXECUTE_TASK", task)["valid"] is True
    path = second_model / "shard-1.gguf"
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\0changed behind the node's back\0")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    result = node.call("EXECUTE_TASK", task)
    assert result["valid"] is False
    assert result["found"] != result["expected"]
    wait_until(lambda: node.files()["two/shard-1.gguf"]["state"] == "invalid")


def test_too_little_memory_is_a_refusal(shards_copy: Path) -> None:
    with daemon(shards_copy, "--ctx-size", str(1 << 24), "--max-sessions", "64") as node:
        with pytest.raises(InsufficientMemoryError) as caught:
            node.call("LOAD_SHARD", {"model": "smol", "shard_id": 0})
        assert caught.value.details["needed_bytes"] > caught.value.details["available_bytes"]
        assert node.call("STATUS")["stages"] == []


def test_any_messagepack_rpc_client_can_talk_to_it(empty: Daemon) -> None:
    """Raw bytes by the public specification, the method as str and as bin."""
    node = empty
    with socket.create_connection(("127.0.0.1", node.ports["rpc"]), 10) as peer:
        unpacker = msgpack.Unpacker()
        peer.sendall(msgpack.packb([2, "no_such_notification", [1]]) + msgpack.packb([0, 1, "STATUS", [{}]]))
        peer.sendall(msgpack.packb([0, 2, b"LIST_FILES", []]) + msgpack.packb([0, 3, "nonsense", [{}]]))
        answers: dict[int, list[object]] = {}
        while len(answers) < 3:
            unpacker.feed(peer.recv(65536))
            for kind, msgid, error, result in unpacker:
                assert kind == 1
                answers[msgid] = [error, result]
    assert answers[1][1]["node_id"] == node.node_id  # type: ignore[index,call-overload]
    assert answers[2] == [None, {"files": []}]
    assert answers[3][0]["code"] == "unknown_command"  # type: ignore[index,call-overload]


def _listening_addresses(pid: int) -> set[tuple[str, int]]:
    import psutil

    return {
        (one.laddr.ip, one.laddr.port)
        for one in psutil.Process(pid).net_connections("inet")
        if one.status in ("LISTEN", "NONE")
    }
