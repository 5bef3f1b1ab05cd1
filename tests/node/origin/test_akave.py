"""The native Akave store, over the labelled stand-in of the SDK (tests/support/akavesdk_standin)."""

import asyncio
import functools
import io
import logging
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.origin.akave.cid import CHUNK_BYTES
from node.origin.akave.sdk import FIXED_NODE
from node.origin.akave.store import open_akave_store
from node.origin.core.credentials import Credentials, Secret
from node.origin.encryption.store import EncryptedStore
from node.origin.factory import open_store
from node.origin.url import OriginUrl
from protocol.errors import (
    InvalidParamsError,
    OriginCorruptError,
    OriginDeniedError,
    OriginError,
    OriginExistsError,
    OriginNotFoundError,
    OriginUnavailableError,
)
from tests.support.origins.akave_parts import (
    BUCKET,
    NODE,
    PRIVATE_KEY,
    STANDIN,
    akave_store,
    expect_real_sdk,
    loaded,
    settings,
    standin_network,
    without_sdk,
)
from tests.support.origins.root_cid import root_cid_of
from tests.support.waiting import eventually

SMALL = random.Random(1).randbytes(5000)


@pytest.fixture
def network() -> Iterator[Any]:
    with standin_network() as network:
        yield network


@pytest.fixture
def node(network: Any) -> Any:
    return network.nodes[NODE]


@pytest.fixture(scope="module")
def large() -> bytes:
    """Two chunks and a bit."""
    return random.Random(2).randbytes(2 * CHUNK_BYTES + 12_345)


@pytest.fixture(scope="module")
def medium(large: bytes) -> bytes:
    """One chunk and a bit."""
    return large[: CHUNK_BYTES + 12_345]


@functools.cache
def root_cid_once(data: bytes) -> str:
    return root_cid_of([data])


def put_behind(network: Any, node: Any, key: str, data: bytes) -> None:
    """Make a file there without the SDK."""
    chunks = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    node.buckets[BUCKET][f"smol/{key}"] = network.File(chunks, root_cid_once(data))


async def test_put_head_get(node: Any) -> None:
    store = akave_store()
    written = await store.put("shards/a", SMALL)
    assert (written.key, written.size, written.root_cid) == ("shards/a", 5000, root_cid_of([SMALL]))
    info = await store.head("shards/a")
    assert (info.key, info.size, info.root_cid) == ("shards/a", 5000, written.root_cid)
    assert info.modified_s == 1_700_000_000
    assert await store.get_range("shards/a", 100, 200) == SMALL[100:200]
    assert await store.get_range("shards/a", 7, 7) == b""
    assert await store.get_ranges("shards/a", [(4000, 5000), (0, 1), (4000, 5000)]) == [
        SMALL[4000:],
        SMALL[:1],
        SMALL[4000:],
    ]
    assert b"".join([part async for part in store.get_stream("shards/a")]) == SMALL
    assert list(node.buckets[BUCKET]) == ["smol/shards/a"]
    assert node.chunks_sent, "and none of it by the connection pool, which costs 200 ms each time"
    assert node.pooled == 0
    await store.close()


async def test_nothing_is_imported_before_the_first_call(network: Any) -> None:
    store = akave_store()
    assert "akavesdk" not in loaded()
    await store.close()
    assert "akavesdk" not in loaded()


async def test_ranges_are_byte_exact_over_chunks(network: Any, node: Any, large: bytes) -> None:
    put_behind(network, node, "big", large)
    store = akave_store()
    edges = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, len(large) - 1, len(large)]
    for start in edges:
        for end in edges:
            if start <= end <= start + CHUNK_BYTES + 1:
                assert await store.get_range("big", start, end) == large[start:end], (start, end)
    # Every chunk was fetched once only: ranges that are close share what was fetched.
    assert sorted(node.chunks_sent) == [("smol/big", 0), ("smol/big", 1), ("smol/big", 2)]
    await store.close()


async def test_a_stream_is_whole_and_in_small_parts(network: Any, node: Any, medium: bytes) -> None:
    put_behind(network, node, "big", medium)
    store = akave_store()
    parts = [part async for part in store.get_stream("big", 5)]
    assert b"".join(parts) == medium[5:]
    assert max(map(len, parts)) <= 1 << 20
    await store.close()


async def test_only_the_chunks_that_a_range_touches_move(network: Any, node: Any, large: bytes) -> None:
    put_behind(network, node, "big", large)
    store = akave_store()
    await store.get_range("big", CHUNK_BYTES + 5, CHUNK_BYTES + 6)
    assert node.chunks_sent == [("smol/big", 1)]
    await store.close()


async def test_readers_at_once_share_a_chunk_and_are_few(network: Any, node: Any, large: bytes) -> None:
    put_behind(network, node, "big", large)
    put_behind(network, node, "other", large)
    store = akave_store()
    ranges = [(name, i * CHUNK_BYTES + 3) for name in ("big", "other") for i in range(3) for _ in range(4)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(store.get_range(name, at, at + 10)) for name, at in ranges]
    assert [task.result() for task in tasks] == [large[at : at + 10] for _, at in ranges]
    assert len(node.chunks_sent) == len(set(node.chunks_sent)) == 6
    assert node.most_at_once <= 2
    await store.close()


async def test_a_reader_that_is_cancelled_leaves_the_chunk_to_the_next(network: Any, node: Any) -> None:
    put_behind(network, node, "a", SMALL)
    store = akave_store()
    await store.head("a")
    node.hang = threading.Event()
    first = asyncio.create_task(store.get_range("a", 0, 10))
    second = asyncio.create_task(store.get_range("a", 0, 10))
    await asyncio.sleep(0.1)
    first.cancel()
    node.hang.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == SMALL[:10]
    await store.close()


@pytest.mark.parametrize(("start", "end"), [(0, 5001), (5001, 5002), (5001, 5001), (3, 2), (-1, 4)])
async def test_ranges_that_are_not_there(network: Any, node: Any, start: int, end: int) -> None:
    put_behind(network, node, "a", SMALL)
    store = akave_store()
    with pytest.raises(OriginCorruptError, match="5000"):
        await store.get_range("a", start, end)
    assert not node.chunks_sent
    await store.close()


async def test_a_chunk_cut_short_is_noticed(network: Any, node: Any) -> None:
    put_behind(network, node, "a", SMALL)
    store = akave_store(retry_total_s=0.5)
    await store.head("a")
    file = node.buckets[BUCKET]["smol/a"]
    file.chunks[0] = SMALL[:-1]
    with pytest.raises(OriginCorruptError, match="4999 bytes instead of 5000"):
        await store.get_range("a", 0, 10)
    file.chunks[0] = SMALL + b"x"
    with pytest.raises(OriginError, match="the chunk has 5000 bytes, and more came"):
        await store.get_range("a", 0, 10)
    file.chunks = []
    with pytest.raises(OriginCorruptError, match="0 chunks are offered"):
        await store.get_range("a", 0, 10)
    await store.close()


async def test_put_of_a_file_tells_how_far_it_is(node: Any, medium: bytes, tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(medium)
    store, told = akave_store(), []
    info = await store.put("big", path, on_bytes=told.append)
    await asyncio.sleep(0)
    assert (info.size, info.root_cid) == (len(medium), root_cid_once(medium))
    assert told == [CHUNK_BYTES, 12_345]
    assert b"".join(node.buckets[BUCKET]["smol/big"].chunks) == medium
    await store.close()


async def test_names_are_written_once(node: Any) -> None:
    store = akave_store()
    await store.put("a", SMALL)
    for if_absent in (False, True):
        with pytest.raises(OriginExistsError, match="written once"):
            await store.put("a", SMALL[::-1], if_absent=if_absent)
    assert node.calls.count("upload") == 1, "it looks before it sends"
    assert store.writes_once
    await store.close()


async def test_below_127_bytes_is_refused_before_anything_moves(node: Any) -> None:
    store = akave_store()
    assert store.min_object_bytes == 127
    with pytest.raises(OriginError, match=r"126 bytes.*pad it"):
        await store.put("a", bytes(126))
    assert node.calls == []
    assert (await store.put("a", bytes(127))).size == 127
    await store.close()


async def test_writes_go_one_after_the_other(node: Any) -> None:
    store, other = akave_store(), akave_store()
    async with asyncio.TaskGroup() as group:
        for i in range(6):
            group.create_task((store, other)[i % 2].put(f"k{i}", SMALL))
    assert node.nonce_losses == 0
    assert len(node.buckets[BUCKET]) == 6
    await store.close()
    await other.close()


async def test_a_lost_nonce_is_tried_again(node: Any) -> None:
    node.foreign_transactions = 2
    store = akave_store()
    await store.put("a", SMALL)
    assert node.nonce_losses == 2
    await store.close()


async def test_a_file_that_ends_early_is_never_committed(node: Any, tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(CHUNK_BYTES + 3_000_000))
    store = akave_store()
    size = path.stat().st_size
    node.hang = threading.Event()
    task = asyncio.create_task(store.put("a", path))
    await eventually(lambda: node.calls == ["file_info"])  # it has opened the file, and hangs at the node
    os.truncate(path, 1_000_000)
    node.hang.set()
    with pytest.raises(OriginError, match=f"ends after 1000000 of {size} bytes"):
        await task
    assert node.buckets[BUCKET] == {}, "and its name is free again"
    await store.close()


async def test_a_read_that_fails_once_is_never_committed(node: Any) -> None:
    # The SDK takes a failed read for the file's end, and commits what it has if the next one does not fail.
    class Flaky(io.BytesIO):
        failed = False

        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= 2_000_000 and not self.failed:
                self.failed = True
                raise OSError("Input/output error")
            return super().read(size)

    store = akave_store()
    with pytest.raises(OriginError, match="Input/output error"):
        await store._upload("a", Flaky(bytes(4_000_000)), 4_000_000, None)
    assert node.buckets[BUCKET] == {}
    await store.close()


async def test_an_upload_that_breaks_frees_its_name(node: Any, medium: bytes) -> None:
    node.fail_chunk = 1
    store = akave_store()
    with pytest.raises(OriginUnavailableError, match="connection reset"):
        await store.put("a", medium)
    assert node.buckets[BUCKET] == {}
    node.fail_chunk = None
    assert (await store.put("a", medium)).size == len(medium)
    await store.close()


async def test_a_name_that_could_not_be_freed(node: Any, caplog: pytest.LogCaptureFixture) -> None:
    node.fail_chunk, node.refuse_deletes = 0, True
    store = akave_store()
    with pytest.raises(OriginUnavailableError):
        await store.put("a", SMALL)
    assert "could not be deleted" in caplog.text
    with pytest.raises(OriginNotFoundError, match="never finished"):
        await store.head("a")
    with pytest.raises(OriginExistsError, match="never finished; delete it, then write it again"):
        await store.put("a", SMALL)
    assert [info.key async for info in store.list()] == []
    node.fail_chunk, node.refuse_deletes = None, False
    await store.delete("a")
    assert (await store.put("a", SMALL)).size == 5000
    await store.close()


async def test_a_put_that_is_cancelled_leaves_nothing(node: Any, large: bytes) -> None:
    store = akave_store()
    begun = asyncio.Event()
    task = asyncio.create_task(store.put("a", large, on_bytes=lambda count: begun.set()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.put("b", SMALL)  # waits for the end of the other
    assert list(node.buckets[BUCKET]) == ["smol/b"]
    await store.close()


async def test_a_root_cid_that_is_not_ours_is_an_error(node: Any) -> None:
    node.wrong_root_cid = "bafybeibe6h3j4r4exxwisj52sytsul3mh4ui64kxsahbmuehdjnmhj774q"
    store = akave_store()
    with pytest.raises(OriginCorruptError, match="bafybeibe6h3j4r4exxw"):
        await store.put("a", SMALL)
    await store.close()


async def test_list(network: Any, node: Any) -> None:
    for key in ("shards/b", "shards/a", "manifests/m"):
        put_behind(network, node, key, SMALL)
    node.buckets[BUCKET]["other/shards/z"] = network.File([SMALL], "x")
    store = akave_store()
    assert [info.key async for info in store.list("shards/")] == ["shards/a", "shards/b"]
    assert [(info.key, info.size) async for info in store.list()] == [
        ("manifests/m", 5000),
        ("shards/a", 5000),
        ("shards/b", 5000),
    ]
    whole = akave_store(f"akave://{BUCKET}")
    assert len([info async for info in whole.list()]) == 4
    await store.close()
    await whole.close()


async def test_names_that_cannot_be_read_are_left_out_of_a_listing(
    network: Any, node: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = akave_store()
    await store.put("shards/a", SMALL)
    files = node.buckets[BUCKET]
    for name in ("smol/a\nb", "smol//a", "smol/../a", "other/a\nb"):
        files[name] = files["smol/shards/a"]
    assert [info.key async for info in store.list()] == ["shards/a"]
    (record,) = caplog.records
    assert "leaves out 3 of 4 objects: '../a', '/a', 'a\\nb' cannot be read" in record.getMessage()
    await store.close()


async def test_a_listing_that_may_be_cut_is_refused(network: Any, node: Any) -> None:
    for i in range(999):
        node.buckets[BUCKET][f"other/{i}"] = network.File([SMALL], "x")
    store = akave_store()
    assert [info async for info in store.list()] == []
    node.buckets[BUCKET]["other/999"] = network.File([SMALL], "x")
    with pytest.raises(OriginError, match="at least 1000 objects"):
        await anext(store.list())
    await store.close()


async def test_delete(node: Any) -> None:
    store = akave_store()
    await store.put("a", SMALL)
    await store.get_range("a", 0, 1)
    await store.delete("a")
    await store.delete("a")
    assert node.calls.count("file_delete") == 1
    for call in (store.head("a"), store.get_range("a", 0, 1)):
        with pytest.raises(OriginNotFoundError, match="no object of that name"):
            await call
    await store.close()


async def test_buckets(node: Any) -> None:
    store = akave_store("akave://another")
    with pytest.raises(OriginNotFoundError, match="bucket 'another' not found"):
        await store.put("a", SMALL)
    with pytest.raises(OriginNotFoundError):
        await anext(store.list())
    await store.create_bucket()
    await store.create_bucket()
    assert node.calls.count("create_bucket") == 1
    await store.put("a", SMALL)
    await store.close()


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/..", "a\x00"])
async def test_no_key_leads_out(node: Any, key: str) -> None:
    store = akave_store()
    for call in (store.head(key), store.put(key, SMALL), store.delete(key), store.get_range(key, 0, 1)):
        with pytest.raises(InvalidParamsError):
            await call
    assert node.calls == []
    await store.close()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("NOT_FOUND", OriginNotFoundError),
        ("PERMISSION_DENIED", OriginDeniedError),
        ("UNAUTHENTICATED", OriginDeniedError),
        ("UNAVAILABLE", OriginUnavailableError),
        ("DEADLINE_EXCEEDED", OriginUnavailableError),
        ("RESOURCE_EXHAUSTED", OriginUnavailableError),
        ("UNIMPLEMENTED", OriginError),
    ],
)
async def test_grpc_statuses(node: Any, status: str, error: type[OriginError]) -> None:
    node.down = [status] * 20
    store = akave_store(retry_total_s=0.3)
    with pytest.raises(OriginError) as caught:
        await store.head("a")
    assert type(caught.value) is error
    assert caught.value.details["origin"] == f"akave://{BUCKET}/smol"
    assert (caught.value.details["key"], caught.value.details["status"]) == ("a", status)
    assert "tried" in caught.value.details
    await store.close()


async def test_what_passes_is_tried_again(network: Any, node: Any) -> None:
    put_behind(network, node, "a", SMALL)
    node.down = ["UNAVAILABLE", "UNAVAILABLE"]
    store = akave_store()
    assert await store.get_range("a", 0, 10) == SMALL[:10]
    await store.close()


async def test_a_node_that_hangs(network: Any, node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put_behind(network, node, "a", SMALL)
    store = akave_store(retry_total_s=0.0)
    await store.head("a")
    monkeypatch.setattr(store, "_small_s", 0.2)
    node.hang = threading.Event()
    for _ in range(6):  # more than there are threads
        with pytest.raises(OriginUnavailableError, match="0 s"):
            await store.head("a")
    assert sum(thread.name == "akavesdk" for thread in threading.enumerate()) <= 4
    node.hang.set()
    node.hang = None
    monkeypatch.setattr(store, "_small_s", 10.0)
    assert (await store.head("a")).size == 5000, "and it goes on once the node does"
    assert await store.get_range("a", 0, 10) == SMALL[:10]
    await store.close()


def test_closing_does_not_wait_for_a_connection_that_hangs(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sdk, begun, go_on = akave_store()._sdk, threading.Event(), threading.Event()

    def hang() -> Any:
        begun.set()
        go_on.wait(30)
        raise ConnectionError("given up")

    monkeypatch.setattr(sdk, "_connected", hang)

    def look() -> None:
        with pytest.raises(ConnectionError):
            sdk._open()

    opening = threading.Thread(target=look)
    opening.start()
    assert begun.wait(10)
    started = time.monotonic()
    sdk.close(patience_s=0.05)
    assert time.monotonic() - started < 5
    go_on.set()
    opening.join(10)
    sdk.close()


async def test_a_hanging_look_does_not_end_an_upload(node: Any) -> None:
    store = akave_store(read_timeout_s=0.2, retry_total_s=0.0)
    hang = threading.Event()

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            hang.wait(10)
            return super().read(size)

    upload = asyncio.create_task(store._upload("slow", Slow(SMALL), len(SMALL), None))
    while "upload" not in node.calls:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    node.hang = threading.Event()
    with pytest.raises(OriginUnavailableError):
        await store.head("a")
    node.hang.set()
    node.hang = None
    hang.set()
    assert (await upload).size == len(SMALL)
    await store.close()


async def test_no_room_for_a_chunk(network: Any, node: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_behind(network, node, "a", SMALL)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    store = akave_store()
    with pytest.raises(OriginError, match=r"temporary file.*TMPDIR"):
        await store.get_range("a", 0, 10)
    await store.close()


async def test_contracts_are_those_of_the_node_that_was_named(network: Any, node: Any) -> None:
    store = akave_store()
    await store.put("a", SMALL)
    assert network.contracts_asked_of == [NODE]
    await store.close()
    network.contracts_asked_of.clear()
    network.nodes[FIXED_NODE] = network.Node(FIXED_NODE, {BUCKET: {}})
    store = akave_store(akave_node=FIXED_NODE)
    await store.put("a", SMALL)
    assert network.contracts_asked_of == [FIXED_NODE], "asked by the SDK itself"
    await store.close()
    network.nodes["ipc.test:1"] = network.Node("ipc.test:1", {BUCKET: {}})
    store = akave_store(akave_ipc="ipc.test:1")
    await store.put("a", SMALL)
    assert network.nodes["ipc.test:1"].opened == 1
    await store.close()


async def test_a_node_that_is_not_there(network: Any) -> None:
    store = akave_store(akave_node="nobody.test:1", retry_total_s=0.2)
    with pytest.raises(OriginUnavailableError, match=r"contract information from nobody\.test:1"):
        await store.head("a")
    await store.close()


def test_without_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    without_sdk(monkeypatch)
    with pytest.raises(OriginError, match=r"not installed.*docs/akave\.md"):
        akave_store()


def test_a_run_of_the_real_sdks_tests_says_at_once_that_it_is_missing(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = request.node
    marked = pytest.Function.from_parent(plain.parent, name="test_a_root_cid", callobj=lambda: None)
    marked.add_marker(pytest.mark.akavesdk)
    without_sdk(monkeypatch)
    expect_real_sdk([plain])
    with pytest.raises(pytest.UsageError, match=r"^2 tests of the marker akavesdk .* not installed .*docs/akave\.md"):
        expect_real_sdk([plain, marked, marked])
    monkeypatch.syspath_prepend(STANDIN)
    expect_real_sdk([marked])


async def test_an_sdk_that_lacks_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "akavesdk.py").write_text("import grpc_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    store = akave_store(retry_total_s=0.0)
    with pytest.raises(OriginError, match=r"grpc_that_is_not_there.*docs/akave\.md"):
        await store.head("a")
    await store.close()


async def test_without_a_private_key(network: Any) -> None:
    with pytest.raises(OriginDeniedError, match="AKAVE_PRIVATE_KEY"):
        open_akave_store(OriginUrl.parse("akave://models"), settings(credentials=Credentials()))


async def test_a_key_that_is_none(network: Any, node: Any) -> None:
    store = akave_store(credentials=Credentials(akave_private_key=Secret("correct horse battery")))
    with pytest.raises(OriginDeniedError, match="64 hexadecimal digits") as caught:
        await store.head("a")
    assert "horse" not in str(caught.value) + repr(caught.value.details)
    await store.close()


async def test_another_module_in_the_place_of_the_sdks(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sdk", os)
    store = akave_store()
    with pytest.raises(OriginError, match="another Python module called 'sdk'"):
        await store.head("a")
    await store.close()


async def test_the_private_key_is_shown_nowhere(
    node: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    bare = PRIVATE_KEY.removeprefix("0x").lower()
    store = akave_store(retry_total_s=0.0)
    await store.put("a", SMALL)
    seen = [repr(store), str(vars(store)), str(vars(store._sdk)), repr(settings())]
    for quoted in (PRIVATE_KEY, bare, bare.upper(), f"0X{bare}"):
        node.says = f"private key {quoted} is not welcome"
        for call in (store.head("a"), store.put("b", SMALL), store.delete("a"), anext(store.list())):
            with pytest.raises(OriginDeniedError, match=r"private key \*\*\* is not welcome") as caught:
                await call
            seen += [repr(caught.value.to_wire()), "".join(traceback.format_exception(caught.value))]
    out, err = capfd.readouterr()
    for text in [*seen, caplog.text, out, err]:
        assert bare not in text.lower()
    await store.close()


async def test_encrypted_on_akave(node: Any, tmp_path: Path) -> None:
    key = tmp_path / "origin.key"
    key.write_text("ab" * 32)
    data = random.Random(5).randbytes(300_000)
    store = open_store(f"o3://{BUCKET}/smol", settings(encryption_key_file=key))
    assert isinstance(store, EncryptedStore), "auto: the SDK is there, and a private key"
    await store.put("a", data)
    await store.put("least", bytes(store.min_object_bytes))
    with pytest.raises(OriginError, match="pad it"):
        await store.put("less", bytes(store.min_object_bytes - 1))
    assert data[:100] not in b"".join(node.buckets[BUCKET]["smol/a"].chunks)
    assert await store.get_ranges("a", [(0, 5), (65_530, 65_540), (299_999, 300_000)]) == [
        data[:5],
        data[65_530:65_540],
        data[-1:],
    ]
    node.corrupt(BUCKET, "smol/a", 0, 200_000)
    fresh = open_store(f"akave://{BUCKET}/smol", settings(encryption_key_file=key))
    with pytest.raises(OriginCorruptError):  # what the SDK gives out as it is
        await fresh.get_range("a", 150_000, 250_000)
    await store.close()
    await fresh.close()


def test_not_in_a_forked_child(network: Any) -> None:
    async def asked() -> int:
        store = akave_store()
        store._pid -= 1
        with pytest.raises(OriginError, match="fork"):
            await store.head("a")
        return 0

    asyncio.run(asked())
