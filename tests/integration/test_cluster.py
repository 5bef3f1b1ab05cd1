"""Three daemons: shards found in the DHT, fetched over BitTorrent, and a model that runs across all of them."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol.errors import (
    CancelledRequestError,
    ContextOverflowError,
    InvalidParamsError,
    ShardInUseError,
    ShardNotFoundError,
    ShardNotLoadedError,
    ShoalError,
    UnknownNameError,
    UnreachableError,
)
from protocol.sync_client import SyncClient
from tests.support.daemons import Daemon, daemon, shoal
from tests.support.pipeline.nodes import WholeModel
from tests.support.waiting import wait_until

TOKENS = 12
CHAT = {
    "task_type": "ai_inference",
    "model": "smol",
    "messages": [{"role": "user", "content": "Name three fish."}],
    "max_tokens": TOKENS,
}
SHORT = {"task_type": "ai_inference", "model": "smol", "prompt": "1 2", "max_tokens": 2}
LONG = {"task_type": "ai_inference", "model": "smol", "prompt": "1 2 3 4", "max_tokens": 400, "stream": True}


@pytest.fixture(scope="module")
def cluster(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Three nodes; the first has the model; each has loaded one shard of it."""
    home = tmp_path_factory.mktemp("cluster")
    shutil.copytree(small_shards, home / "a" / "shards" / "smol")
    with (
        daemon(home / "a") as a,
        daemon(home / "b", bootstrap=a) as b,
        daemon(home / "c", bootstrap=a) as c,
    ):
        nodes = [a, b, c]
        sources = [node.call("LOAD_SHARD", {"model": "smol", "shard_id": i}) for i, node in enumerate(nodes)]
        assert [one["source"] for one in sources] == ["local", "peers", "peers"]
        assert sources[1]["bytes_by_source"] == {"peers": sources[1]["bytes"]}
        yield nodes


def no_sessions(cluster: list[Daemon]) -> None:
    """Wait until no stage of any node has a session open."""
    for node in cluster:
        wait_until(lambda node=node: not any(one["sessions"] for one in node.call("STATUS")["stages"]))  # type: ignore[misc]


def test_a_fetched_shard_is_the_same_file_and_is_seeded_on(cluster: list[Daemon], small_shards: Path) -> None:
    (fetched,) = [file for file in cluster[1].files().values() if file.get("shard_id") == 1]
    assert fetched["state"] == "loaded"
    path = cluster[1].home / "shards" / fetched["filename"]
    assert path.read_bytes() == (small_shards / "shard-1.gguf").read_bytes()
    (origin,) = [file for file in cluster[0].files().values() if file.get("shard_id") == 1]
    assert fetched["info_hash"] == origin["info_hash"], "torrents that were made apart are one swarm"
    assert cluster[0].call("STATUS")["swarm"]["uploaded_bytes"] >= fetched["size"]


def test_every_node_knows_the_others(cluster: list[Daemon]) -> None:
    ids = {node.node_id for node in cluster}
    for node in cluster:
        wait_until(lambda node=node: {one["node_id"] for one in node.call("NODES")["nodes"]} == ids)  # type: ignore[misc]


def test_a_pipeline_over_three_nodes_gives_the_tokens_of_one(cluster: list[Daemon]) -> None:
    results = [node.call("EXECUTE_TASK", CHAT | {"auto_load": False}) for node in cluster]
    assert [stage["node"] for stage in results[0]["stages"]] == [node.node_id for node in cluster]
    assert [stage["layers"] for stage in results[0]["stages"]] == [[0, 2], [2, 4], [4, 6]]
    assert results[0]["tokens"] == results[1]["tokens"] == results[2]["tokens"]
    assert results[0]["usage"]["completion_tokens"] == len(results[0]["tokens"]) > 5
    assert "fish" in results[0]["text"].lower() or results[0]["text"].strip()


def test_streamed_pieces_are_the_text(cluster: list[Daemon]) -> None:
    pieces: list[dict[str, Any]] = []
    result = cluster[1].call(
        "EXECUTE_TASK",
        CHAT | {"stream": True},
        request_id="stream-1",
        on_notification=lambda method, params: pieces.append({"method": method, **params}),
    )
    assert {piece["method"] for piece in pieces} == {"TASK_OUTPUT"}
    assert {piece["request_id"] for piece in pieces} == {"stream-1"}
    assert len(pieces) > 3
    assert "".join(piece["text"] for piece in pieces) == result["text"]
    assert [token for piece in pieces for token in piece["tokens"]] == result["tokens"]


@pytest.mark.slow  # a model of more layers is needed to draw half a character
def test_text_that_ends_inside_a_character(smollm2_shards: Path, tmp_path: Path) -> None:
    """An emoji takes several tokens; the answer is cut after the first of them."""
    shutil.copytree(smollm2_shards, tmp_path / "a" / "shards" / "smol")
    task = {
        "task_type": "ai_inference",
        "prompt": "\U0001f600\U0001f603\U0001f604\U0001f601\U0001f606" * 2,
        "max_tokens": 1,
        "stream": True,
    }
    pieces: list[str] = []
    with daemon(tmp_path / "a") as node:
        result = node.call(
            "EXECUTE_TASK", task, on_notification=lambda _, params: pieces.append(params.get("text", ""))
        )
        answer = node.call("EXECUTE_TASK", task | {"prompt": "The capital of France is", "max_tokens": 16})
    assert result["text"].endswith("\ufffd"), "the model drew another token: choose another prompt"
    assert "".join(pieces) == result["text"]
    assert "Paris" in answer["text"]


def test_figures_are_sane(cluster: list[Daemon]) -> None:
    began = time.monotonic()
    told: list[str] = []
    timings = cluster[0].call("EXECUTE_TASK", CHAT, on_notification=lambda name, _: told.append(name))["timings"]
    took = time.monotonic() - began
    assert "PROGRESS" not in told, "everything is loaded"
    assert 0 <= timings["load_s"] < 3, "what it takes to find them"
    assert 0 < timings["time_to_first_token_s"] < timings["total_s"] < took
    decode_s = timings["total_s"] - timings["time_to_first_token_s"]
    assert timings["tokens_per_s"] == pytest.approx((TOKENS - 1) / decode_s, rel=0.1)


def test_the_command_line_against_real_nodes(cluster: list[Daemon]) -> None:
    target = f"127.0.0.1:{cluster[1].ports['rpc']}"
    text = cluster[0].call("EXECUTE_TASK", CHAT | {"max_tokens": 6})["text"]
    said = shoal("generate", target, "--prompt", "Name three fish.", "--max-tokens", "6")
    assert (said.returncode, said.stdout) == (0, text + "\n")
    assert "3 stages" in said.stderr
    listed = shoal("nodes", target)
    assert all(node.node_id[:12] in listed.stdout for node in cluster)
    assert "stage    smol shards 1" in shoal("status", target).stdout
    envelope = json.loads(shoal("call", target, "LOAD_SHARD", '{"model": "smol", "shard_id": 7}').stdout)
    assert envelope["error"]["code"] == "shard_not_found"


def test_ctrl_c_ends_a_generation(cluster: list[Daemon]) -> None:
    command = [sys.executable, "-m", "node", "generate", f"127.0.0.1:{cluster[0].ports['rpc']}", "--raw"]
    with subprocess.Popen(
        [*command, "--prompt", "1 2 3 4", "--max-tokens", "400"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert b"Traceback" not in said
    no_sessions(cluster)


def test_a_client_that_leaves_frees_its_session(cluster: list[Daemon]) -> None:
    class LeavingError(Exception):
        pass

    def leave(*_: object) -> None:
        client.close()
        raise LeavingError

    with SyncClient("127.0.0.1", cluster[2].ports["rpc"]) as client, pytest.raises(LeavingError):
        client.call("EXECUTE_TASK", LONG, on_notification=leave)
    began = time.monotonic()
    no_sessions(cluster)
    assert time.monotonic() - began < 10, "it was noticed by the keepalive, after 11 s"


def test_a_coordinator_that_runs_no_stage_and_dies(cluster: list[Daemon], tmp_path: Path) -> None:
    expected = cluster[0].call("EXECUTE_TASK", CHAT)["tokens"]
    with daemon(tmp_path / "d", bootstrap=cluster[0]) as node:
        result = node.call("EXECUTE_TASK", CHAT | {"auto_load": False})
        assert result["tokens"] == expected
        assert node.node_id not in {stage["node"] for stage in result["stages"]}
        assert node.call("STATUS")["stages"] == []
        assert node.files() == {}

        def kill(*_: object) -> None:
            if node.process.poll() is None:
                node.process.kill()

        with pytest.raises(UnreachableError):
            node.call("EXECUTE_TASK", LONG, on_notification=kill)
        no_sessions(cluster)


def test_a_stop_string_ends_it_and_is_not_shown(cluster: list[Daemon]) -> None:
    whole = cluster[0].call("EXECUTE_TASK", CHAT)
    stop = whole["text"][12:17]
    result = cluster[0].call("EXECUTE_TASK", CHAT | {"stop": [stop]})
    assert result["finish_reason"] == "stop"
    assert result["text"] == whole["text"][: whole["text"].index(stop)]


def test_a_plain_prompt_and_sampling_by_seed(cluster: list[Daemon], six_layers: Path) -> None:
    task: dict[str, Any] = {"task_type": "ai_inference", "model": "smol", "prompt": "The capital", "max_tokens": 16}
    with contextlib.closing(WholeModel(six_layers)) as whole:
        assert cluster[2].call("EXECUTE_TASK", task)["tokens"] == whole.generate(task["prompt"], 16)
    warm = task | {"temperature": 1.2, "top_p": 0.95, "top_k": 50, "min_p": 0.01}
    texts = [cluster[0].call("EXECUTE_TASK", warm | {"seed": seed})["tokens"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_sessions_at_once_do_not_disturb_each_other(cluster: list[Daemon]) -> None:
    prompts = ["Count to five.", "Name a colour.", "What is ice?"]
    tasks = [CHAT | {"messages": [{"role": "user", "content": prompt}], "exact": True} for prompt in prompts]
    alone = [cluster[0].call("EXECUTE_TASK", task)["tokens"] for task in tasks]
    together: list[Any] = [None] * len(tasks)

    def run(i: int) -> None:
        together[i] = cluster[i].call("EXECUTE_TASK", tasks[i])["tokens"]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "no-such-model"}, UnknownNameError),
        ({"prompt": "and messages"}, InvalidParamsError),
        ({"temperature": -1}, InvalidParamsError),
        ({"max_tokens": 0}, InvalidParamsError),
        ({"messages": [{"role": "user", "content": "fish " * 2000}]}, ContextOverflowError),
        ({"max_tokens": 100_000}, ContextOverflowError),
        ({"tempertaure": 1.0}, InvalidParamsError),
        ({"messages": [], "prompt": ""}, InvalidParamsError),
    ],
)
def test_bad_tasks_are_refused_and_the_pipeline_goes_on(
    cluster: list[Daemon], change: dict[str, Any], error: type[ShoalError]
) -> None:
    with pytest.raises(error):
        cluster[0].call("EXECUTE_TASK", CHAT | change)
    assert cluster[0].call("EXECUTE_TASK", SHORT)["tokens"]
    assert all(stage["sessions"] == 0 for stage in cluster[0].call("STATUS")["stages"])


def test_cancel_ends_a_generation(cluster: list[Daemon]) -> None:
    begun = threading.Event()
    failure: list[Exception] = []

    def run() -> None:
        try:
            cluster[0].call("EXECUTE_TASK", LONG, request_id="long", on_notification=lambda *_: begun.set())
        except ShoalError as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(20)
    assert cluster[0].call("CANCEL", {"request_id": "long"})["cancelled"] is True
    thread.join(10)
    assert [type(error) for error in failure] == [CancelledRequestError]
    assert cluster[0].call("CANCEL", {"request_id": "long"})["cancelled"] is False
    no_sessions(cluster)


def test_a_loaded_shard_is_not_evicted(cluster: list[Daemon]) -> None:
    with pytest.raises(ShardInUseError):
        cluster[1].call("EVICT_SHARD", {"model": "smol", "shard_id": 1})
    assert cluster[0].call("EXECUTE_TASK", SHORT)["tokens"]


def test_without_auto_load_a_missing_shard_is_an_error_that_says_what_to_do(cluster: list[Daemon]) -> None:
    cluster[2].call("UNLOAD_SHARD", {"model": "smol", "shard_id": 2})
    with pytest.raises(ShardNotLoadedError, match="LOAD_SHARD") as caught:
        cluster[0].call("EXECUTE_TASK", CHAT | {"auto_load": False})
    assert caught.value.details["shards"] == [2]
    told: list[dict[str, Any]] = []
    result = cluster[0].call(
        "EXECUTE_TASK", CHAT, request_id="mine", on_notification=lambda method, found: told.append({method: found})
    )
    progress = [one["PROGRESS"] for one in told if "PROGRESS" in one]
    assert {(one["request_id"], one["shard_id"]) for one in progress} == {("mine", 2)}, "what a load of it does is told"
    assert [shard for stage in result["stages"] for shard in stage["shards"]] == [0, 1, 2]


def test_a_killed_engine_is_not_the_end_of_the_node(cluster: list[Daemon]) -> None:
    before = cluster[0].call("EXECUTE_TASK", CHAT)["tokens"]
    (stage,) = cluster[1].call("STATUS")["stages"]
    psutil.Process(stage["pid"]).kill()
    wait_until(lambda: cluster[1].call("STATUS")["stages"] == [])
    assert "loaded" not in {file["state"] for file in cluster[1].files().values()}
    assert cluster[0].call("EXECUTE_TASK", CHAT)["tokens"] == before


def test_another_cluster_sees_nothing(cluster: list[Daemon], tmp_path: Path) -> None:
    with daemon(tmp_path / "other", "--cluster", "other", bootstrap=cluster[0]) as other:
        wait_until(lambda: other.call("STATUS")["dht"]["nodes"] > 0)
        with pytest.raises(UnknownNameError):
            other.call("LOAD_SHARD", {"model": "smol", "shard_id": 1})
        assert [one["node_id"] for one in other.call("NODES")["nodes"]] == [other.node_id]


def test_assigned_shards_are_fetched_and_loaded_at_start(cluster: list[Daemon], tmp_path: Path) -> None:
    with daemon(tmp_path / "d", "--assign", "smol:1", bootstrap=cluster[0]) as node:
        wait_until(lambda: [stage["shards"] for stage in node.call("STATUS")["stages"]] == [[1]], timeout_s=30)
        assert node.end() < 5


@pytest.mark.timeout(150)
def test_published_files_and_a_second_model_while_the_nodes_run(
    cluster: list[Daemon], six_layers: Path, tmp_path: Path
) -> None:
    """The second model is the first, cut otherwise: so its tokens are known."""
    cut = ["split", str(six_layers), "--out", str(tmp_path / "cut"), "--shards", "2", "--model", "two"]
    assert shoal(*cut).returncode == 0
    (tmp_path / "notes.txt").write_text("a loose file")
    for path in ("cut", "notes.txt"):
        assert shoal("publish", str(tmp_path / path), "--data-dir", str(cluster[1].home)).returncode == 0

    def fetched() -> bool:
        try:
            path = cluster[2].call("FETCH_SHARD", {"filename": "notes.txt"})["path"]
        except ShardNotFoundError:  # not announced yet
            return False
        return Path(path).read_text() == "a loose file"

    wait_until(fetched)

    alone = cluster[0].call("EXECUTE_TASK", CHAT)["tokens"]
    together: dict[str, Any] = {}

    def run(name: str) -> None:
        together[name] = cluster[0].call("EXECUTE_TASK", CHAT | {"model": name})["tokens"]

    threads = [threading.Thread(target=run, args=(name,)) for name in ("smol", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert together == {"smol": alone, "two": alone}
    stages = [stage for node in cluster for stage in node.call("STATUS")["stages"]]
    assert {stage["model"] for stage in stages} == {"smol", "two"}
    assert len({stage["pid"] for stage in stages}) == len(stages), "a model has an engine process of its own"
