"""The native Akave store over the real akavesdk: `pytest -m akavesdk`, where it is installed (docs/akave.md).

The node and the chain are in this process (akave_local_node.py): nothing here reaches Akave.
"""

import asyncio
import dataclasses
import inspect
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.origin.akave.cid import BLOCK_BYTES, CHUNK_BYTES, same_cid
from protocol.errors import OriginExistsError, OriginNotFoundError, OriginUnavailableError
from tests.support.origins.akave_local_node import World, local_akave
from tests.support.origins.akave_parts import STANDIN, akave_store, loaded
from tests.support.origins.root_cid import root_cid_of

# The SDK, web3 and protobuf warn of their own old age; with filterwarnings = error that would be a failure.
pytestmark = [pytest.mark.akavesdk, pytest.mark.filterwarnings("ignore")]

SMALL = random.Random(1).randbytes(5000)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with local_akave() as world:
        yield world


@pytest.fixture(scope="module")
def large() -> bytes:
    return random.Random(3).randbytes(CHUNK_BYTES + 2_345_678)


@pytest.mark.parametrize("size", [1, 127, BLOCK_BYTES, BLOCK_BYTES + 1, CHUNK_BYTES, CHUNK_BYTES + 1])
def test_root_cids(world: World, size: int) -> None:
    from sdk.dag import DAGRoot, build_dag

    data = random.Random(size).randbytes(size)
    root = DAGRoot.new()
    for at in range(0, size, CHUNK_BYTES):
        chunk = build_dag(None, io.BytesIO(data[at : at + CHUNK_BYTES]), BLOCK_BYTES)
        root.add_link(chunk.cid, chunk.raw_data_size, chunk.encoded_size)
    assert root_cid_of([data]) == str(root.build())


async def test_there_and_back(world: World, large: bytes, tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(large)
    store, told = akave_store(akave_node=world.address), []
    info = await store.put("big", path, on_bytes=told.append)
    assert info.root_cid == root_cid_of([large])
    assert same_cid(info.root_cid, world.files["smol/big"].root_cid), "as the contract got it"
    assert (await store.head("big")).size == len(large)
    world.ranges.clear()
    for start, end in [(0, 10), (CHUNK_BYTES - 5, CHUNK_BYTES + 5), (len(large) - 1, len(large))]:
        assert await store.get_range("big", start, end) == large[start:end]
    assert world.ranges == [(0, 1), (1, 2)], "chunk indices, end-exclusive"
    assert b"".join([part async for part in store.get_stream("big", 7)]) == large[7:]
    await asyncio.sleep(0)
    assert sum(told) == len(large)
    await store.close()


async def test_names_are_written_once(world: World) -> None:
    store = akave_store(akave_node=world.address)
    await store.put("once", SMALL)
    with pytest.raises(OriginExistsError):
        await store.put("once", SMALL)
    # As the SDK itself says it, where somebody was faster than our look.
    with pytest.raises(OriginExistsError, match="already exists"):
        await store._upload("once", io.BytesIO(SMALL), len(SMALL), None)
    assert world.files["smol/once"].size == 5000, "and what is there stays"
    assert "once" in [info.key async for info in store.list()]
    await store.delete("once")
    with pytest.raises(OriginNotFoundError):
        await store.head("once")
    await store.close()


async def test_writers_at_once(world: World) -> None:
    store = akave_store(akave_node=world.address)
    lost = world.lost
    async with asyncio.TaskGroup() as group:
        for i in range(4):
            group.create_task(store.put(f"many/{i}", SMALL))
    assert world.lost == lost
    await store.close()


async def test_nothing_is_checked_on_download_by_the_sdk(world: World) -> None:
    store = akave_store(akave_node=world.address)
    await store.put("bad", SMALL)
    cid = root_cid_of([SMALL])  # of its one chunk's one block, too
    block = bytearray(world.blocks[cid])
    block[1000] ^= 1
    world.blocks[cid] = bytes(block)
    assert await store.get_range("bad", 0, 5000) != SMALL
    await store.close()


async def test_a_file_cut_short_is_not_committed(world: World, large: bytes) -> None:
    store = akave_store(akave_node=world.address)
    with pytest.raises(Exception, match="ends after"):
        await store._upload("cut", io.BytesIO(large), len(large) + 1, None)
    assert "smol/cut" not in world.files
    await store.close()


async def test_buckets(world: World) -> None:
    store = akave_store("akave://another", akave_node=world.address)
    with pytest.raises(OriginNotFoundError, match="not found"):
        await store.put("a", SMALL)
    await store.create_bucket()
    await store.put("a", SMALL)
    await store.close()


async def test_a_node_that_is_not_there(world: World) -> None:
    store = akave_store(akave_node="127.0.0.1:1", retry_total_s=0.2)
    with pytest.raises(OriginUnavailableError):
        await store.head("a")
    await store.close()


def public(cls: Any) -> dict[str, list[str]]:
    return {
        name: list(inspect.signature(method).parameters)
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }


def test_the_stand_in_has_the_same_classes(world: World) -> None:
    """Each public method, its parameters, and each setting of the stand-in is one of the real SDK."""
    import ast

    import akavesdk

    ours = {
        node.name: node
        for path in (STANDIN / "sdk").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    assert loaded()
    real = public(akavesdk.IPC) | public(akavesdk.SDK)
    for cls in ("IPC", "SDK"):
        for method in ours[cls].body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                assert real[method.name] == [arg.arg for arg in method.args.args], method.name
    fields = [one.target.id for one in ours["SDKConfig"].body if isinstance(one, ast.AnnAssign)]
    assert fields == [one.name for one in dataclasses.fields(akavesdk.SDKConfig)]
