"""Two gloo ranks on loopback save a cut model; one process loads it whole, and the other way round."""

from __future__ import annotations

import os
import re
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.support.bridge.forkserver import forkserver
from torch_bridge import O3Client
from torch_bridge.checkpoints.dcp import O3StorageReader, O3StorageWriter
from torch_bridge.checkpoints.state import UnsayableStateError, flatten

pytestmark = [
    pytest.mark.timeout(200),  # the server of the ranks imports torch first
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]
RANKS = 2
WAIT_S = 90.0
DIMS = {"rows": 0, "columns": 1, "one": 0}


def whole() -> dict[str, torch.Tensor]:
    """The tensors before they are cut."""
    return {
        "rows": torch.arange(37 * 64, dtype=torch.float32).reshape(37, 64),
        "columns": torch.arange(64 * 50, dtype=torch.float32).reshape(64, 50).bfloat16(),
        "one": torch.full((1, 300), 7.0),
        "same": torch.ones(999),
    }


def cut(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As a rank holds them: `one` has no row for the second."""
    mesh = init_device_mesh("cpu", (RANKS,))
    return {
        name: distribute_tensor(tensor, mesh, [Shard(DIMS[name])]) if name in DIMS else tensor
        for name, tensor in tensors.items()
    }


def one_rank(rank: int, rendezvous: str, url: str, said: Connection) -> None:
    """Load what one process saved, and save it cut."""
    try:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
        store = O3Client().at(url)
        state: dict[str, Any] = {
            "model": cut({name: torch.zeros_like(tensor) for name, tensor in whole().items()}),
            "step": 0,
        }
        dcp.load(state, storage_reader=O3StorageReader(store, "of-one"))
        wanted = cut(whole())
        assert state["step"] == 12
        for name, tensor in state["model"].items():
            here, there = (t.to_local() if name in DIMS else t for t in (tensor, wanted[name]))
            assert torch.equal(here, there), name
        state["step"] = 13
        dcp.save(state, storage_writer=O3StorageWriter(store, "of-two"))
        dist.destroy_process_group()
        said.send("done")
    except BaseException:
        said.send(traceback.format_exc())
    finally:
        said.close()
        os._exit(0)


def run_ranks(folder: Path, url: str) -> list[str]:
    """What each rank says at its end."""
    context = forkserver()  # a fork of this process would inherit the locks of whatever ran in it
    answers = []
    ranks = []
    for rank in range(RANKS):
        answer, said = context.Pipe(duplex=False)
        process = context.Process(target=one_rank, args=(rank, str(folder / "rendezvous"), url, said))
        process.start()
        said.close()
        ranks.append(process)
        answers.append(answer)
    try:
        return [answer.recv() if answer.poll(WAIT_S) else "nothing in time" for answer in answers]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def test_what_one_process_saved_two_ranks_load_and_the_other_way_round(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'store'}"
    (tmp_path / "store").mkdir()
    store = O3Client().at(url)
    dcp.save({"model": whole(), "step": 12}, storage_writer=O3StorageWriter(store, "of-one"))
    uncut = {item.key for item in store.list("shards/")}

    assert run_ranks(tmp_path, url) == ["done"] * RANKS

    state: dict[str, Any] = {"model": {name: torch.zeros_like(t) for name, t in whole().items()}, "step": 0}
    dcp.load(state, storage_reader=O3StorageReader(store, "of-two"))
    assert state["step"] == 13
    for name, tensor in whole().items():
        assert torch.equal(state["model"][name], tensor), name
    # What each rank wrote is small, and lies together.
    assert len({item.key for item in store.list("shards/")} - uncut) == RANKS


def refusals(say: Connection) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    states: dict[str, Any] = {
        "DTensor": torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])),
        "ShardedTensor": sharded_tensor.empty(ChunkShardingSpec(0, ["rank:0/cpu"]), 4, 4),
    }
    for kind, sharded in states.items():
        try:
            flatten({"model": {"layer.weight": sharded}})
        except UnsayableStateError as error:
            say.send((kind, str(error)))
    dist.destroy_process_group()
    say.close()


def test_a_sharded_state_is_refused_by_name_where_no_other_rank_takes_part() -> None:
    # In a process of its own: torch keeps the group in a thread's memory, and a fork by another thread would hang.
    hear, say = forkserver().Pipe(duplex=False)
    process = forkserver().Process(target=refusals, args=(say,))
    process.start()
    say.close()
    found = {}
    while len(found) < 2 and hear.poll(WAIT_S):
        kind, message = hear.recv()
        found[kind] = message
    process.join(WAIT_S)
    assert found.keys() == {"DTensor", "ShardedTensor"}
    for kind, message in found.items():
        assert re.search(rf"'model/layer.weight' is a {kind}, .*O3StorageWriter", message)
