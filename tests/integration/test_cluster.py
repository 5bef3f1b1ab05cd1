"""Three daemons: shards found in the DHT, fetched over BitTorrent, and a model that runs across all of them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from daemons import Daemon, daemon, wait_until

from protocol.errors import (
    CancelledRequestError,
    ContextOverflowError,
    InvalidParamsError,
    ShardInUseError,
    ShardNotLoadedError,
    ShoalError,
    UnknownNameError,
)

CHAT = {"task_type": "ai_inference", "messages": [{"role": "user", "content": "Name three fish."}], "max_tokens": 24}


@pytest.fixture(scope="module")
def cluster(smollm2_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Three nodes; the first has the model; each has loaded one shard of it."""
    home = tmp_path_factory.mktemp("cluster")
    shutil.copytree(smollm2_shards, home / "a" / "shards" / "smol")
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


def test_a_fetched_shard_is_the_same_file_and_is_seeded_on(cluster: list[Daemon], smollm2_shards: Path) -> None:
    (fetched,) = [file for file in cluster[1].files().values() if file.get("shard_id") == 1]
    assert fetched["state"] == "loaded"
    path = cluster[1].home / "shards" / fetched["filename"]
    assert path.read_bytes() == (smollm2_shards / "shard-1.gguf").read_bytes()
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
    assert [stage["layers"] for stage in results[0]["stages"]] == [[0, 10], [10, 20], [20, 30]]
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


def test_a_stop_string_ends_it_and_is_not_shown(cluster: list[Daemon]) -> None:
    whole = cluster[0].call("EXECUTE_TASK", CHAT)
    stop = whole["text"][12:17]
    result = cluster[0].call("EXECUTE_TASK", CHAT | {"stop": [stop]})
    assert result["finish_reason"] == "stop"
    assert result["text"] == whole["text"][: whole["text"].index(stop)]


def test_a_plain_prompt_and_sampling_by_seed(cluster: list[Daemon]) -> None:
    task = {"task_type": "ai_inference", "model": "smol", "prompt": "The capital of France is", "max_tokens": 16}
    assert "Paris" in cluster[2].call("EXECUTE_TASK", task)["text"]
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
    assert cluster[0].call("EXECUTE_TASK", CHAT | {"max_tokens": 2})["tokens"]
    assert all(stage["sessions"] == 0 for stage in cluster[0].call("STATUS")["stages"])


def test_cancel_ends_a_generation(cluster: list[Daemon]) -> None:
    begun = threading.Event()
    failure: list[Exception] = []

    def run() -> None:
        task = CHAT | {"prompt": "1 2 3 4", "max_tokens": 400, "stream": True}
        del task["messages"]
        try:
            cluster[0].call("EXECUTE_TASK", task, request_id="long", on_notification=lambda *_: begun.set())
        except ShoalError as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(20)
    assert cluster[0].call("CANCEL", {"request_id": "long"})["cancelled"] is True
    thread.join(10)
    assert [type(error) for error in failure] == [CancelledRequestError]
    assert cluster[0].call("CANCEL", {"request_id": "long"})["cancelled"] is False
    for node in cluster:
        wait_until(lambda node=node: all(s["sessions"] == 0 for s in node.call("STATUS")["stages"]))  # type: ignore[misc]


def test_a_loaded_shard_is_not_evicted(cluster: list[Daemon]) -> None:
    with pytest.raises(ShardInUseError):
        cluster[1].call("EVICT_SHARD", {"model": "smol", "shard_id": 1})
    assert cluster[0].call("EXECUTE_TASK", CHAT | {"max_tokens": 2})["tokens"]


def test_without_auto_load_a_missing_shard_is_an_error_that_says_what_to_do(cluster: list[Daemon]) -> None:
    cluster[2].call("UNLOAD_SHARD", {"model": "smol", "shard_id": 2})
    with pytest.raises(ShardNotLoadedError, match="LOAD_SHARD") as caught:
        cluster[0].call("EXECUTE_TASK", CHAT | {"auto_load": False})
    assert caught.value.details["shards"] == [2]
    result = cluster[0].call("EXECUTE_TASK", CHAT)
    assert [shard for stage in result["stages"] for shard in stage["shards"]] == [0, 1, 2]


def test_a_killed_engine_is_not_the_end_of_the_node(cluster: list[Daemon]) -> None:
    before = cluster[0].call("EXECUTE_TASK", CHAT)["tokens"]
    (stage, *_) = cluster[1].call("STATUS")["stages"]
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
