"""Encryption above a real store: a folder, file://."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.origin.encryption.frames import FRAME_BYTES, HEADER_BYTES, STORED_FRAME, plain_size, stored_size
from node.origin.encryption.store import EncryptedStore
from node.origin.local import FileStore
from node.origin.url import OriginUrl
from protocol.errors import InvalidParamsError, OriginCorruptError, OriginError, OriginNotFoundError

KEY = bytes(range(32))
SIZES = [0, 1, 127, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 3 * FRAME_BYTES, 40 * FRAME_BYTES + 777]


def bytes_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "origin"
    folder.mkdir()
    return folder


def store_over(folder: Path, key: bytes = KEY) -> EncryptedStore:
    return EncryptedStore(FileStore(OriginUrl.parse(f"file://{folder}")), key)


async def read_all(parts: AsyncIterator[bytes]) -> bytes:
    return b"".join([part async for part in parts])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("as_file", [True, False])
async def test_there_and_back(folder: Path, tmp_path: Path, size: int, as_file: bool) -> None:
    data, store, told = bytes_of(size), store_over(folder), []
    path = tmp_path / "plain"
    path.write_bytes(data)
    info = await store.put("shards/a", path if as_file else data, on_bytes=told.append)
    assert info.size == size
    assert sum(told) == size
    assert (await store.head("shards/a")).size == size
    stored = (folder / "shards/a").read_bytes()
    assert len(stored) == stored_size(size)
    assert size < 100 or data[:100] not in stored
    assert await store.get_range("shards/a", 0, size) == data
    assert await read_all(store.get_stream("shards/a")) == data
    assert [info.size async for info in store.list()] == [size]
    await store.close()


@pytest.fixture(scope="module")
def many_frames() -> bytes:
    return bytes_of(20 * FRAME_BYTES + 1000)


_PLACES = st.one_of(
    st.integers(0, 20 * FRAME_BYTES + 1000),
    st.builds(lambda frame, off: frame * FRAME_BYTES + off, st.integers(0, 19), st.integers(0, 2)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranges=st.lists(st.tuples(_PLACES, _PLACES).map(sorted), min_size=1, max_size=4))
def test_any_range(folder: Path, many_frames: bytes, ranges: list[list[int]]) -> None:
    async def check() -> None:
        store = store_over(folder)
        if not (folder / "a").exists():
            await store.put("a", many_frames)
        wanted = [(start, end) for start, end in ranges]
        assert await store.get_ranges("a", wanted) == [many_frames[start:end] for start, end in wanted]
        start, end = wanted[0]
        assert await read_all(store.get_stream("a", start, end)) == many_frames[start:end]
        await store.close()

    asyncio.run(check())


@given(size=st.integers(0, 1 << 50))
def test_sizes(size: int) -> None:
    stored = stored_size(size)
    assert plain_size(stored) == size
    assert stored - size == HEADER_BYTES + 16 * max(1, -(-size // FRAME_BYTES))


@pytest.mark.parametrize("stored", [0, 39, 40, 55, HEADER_BYTES + STORED_FRAME + 1, HEADER_BYTES + STORED_FRAME + 16])
def test_sizes_that_none_of_ours_has(stored: int) -> None:
    with pytest.raises(ValueError, match=str(stored)):
        plain_size(stored)


async def test_the_format_is_the_one_that_is_written_down(folder: Path) -> None:
    """Decrypted here from the description alone, so that what is stored can be read without this code."""
    data, store = bytes_of(2 * FRAME_BYTES + 5), store_over(folder)
    await store.put("a/ü", data)
    stored = (folder / "a/ü").read_bytes()
    header, rest = stored[:40], stored[40:]
    assert header[:8] == b"SHOALE01"
    cipher = AESGCM(HKDF(SHA256(), 32, header[8:], b"shoal object v1").derive(KEY))
    plain = b""
    for number in range(3):
        nonce = number.to_bytes(11, "big") + (b"\1" if number == 2 else b"\0")
        frame = rest[number * 65_552 : (number + 1) * 65_552]
        plain += cipher.decrypt(nonce, frame, header + "a/ü".encode())
    assert plain == data


async def refused(store: EncryptedStore, key: str, size: int) -> None:
    """Neither way gives a wrong byte; the stream may give right ones first."""
    with pytest.raises(OriginCorruptError, match=key):
        await store.get_range(key, 0, size)
    given: list[bytes] = []

    async def read() -> None:
        async for part in store.get_stream(key):
            given.append(part)  # noqa: PERF401 - what came before the failure counts

    with pytest.raises(OriginCorruptError, match=key):
        await read()
    assert bytes_of(size).startswith(b"".join(given))


async def test_any_changed_byte(folder: Path) -> None:
    size = FRAME_BYTES + 50
    await store_over(folder).put("a", bytes_of(size))
    whole = (folder / "a").read_bytes()
    for place in (0, 8, 39, 40, 41, 40 + FRAME_BYTES, 40 + STORED_FRAME - 1, 40 + STORED_FRAME, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        (folder / "a").write_bytes(changed)
        await refused(store_over(folder), "a", size)
    (folder / "a").write_bytes(whole)
    assert await store_over(folder).get_range("a", 0, size) == bytes_of(size)


async def test_frames_left_out_doubled_or_in_another_order(folder: Path) -> None:
    size = 4 * FRAME_BYTES
    await store_over(folder).put("a", bytes_of(size))
    whole = (folder / "a").read_bytes()
    header, frames = whole[:40], [whole[40 + i * STORED_FRAME : 40 + (i + 1) * STORED_FRAME] for i in range(4)]
    for order in ([0, 1, 2], [1, 2, 3], [0, 1, 3], [1, 0, 2, 3], [0, 1, 2, 3, 3], [0, 0, 2, 3], [3], [0]):
        (folder / "a").write_bytes(header + b"".join(frames[i] for i in order))
        with pytest.raises(OriginCorruptError):
            await store_over(folder).get_range("a", 0, min(size, len(order) * FRAME_BYTES))
    (folder / "a").write_bytes(whole[:-1])
    with pytest.raises(OriginCorruptError):
        await read_all(store_over(folder).get_stream("a"))


async def test_objects_that_change_places(folder: Path) -> None:
    store = store_over(folder)
    await store.put("a", bytes_of(1000))
    await store.put("b", bytes_of(1000, seed=2))
    os.rename(folder / "b", folder / "a")
    await refused(store_over(folder), "a", 1000)


async def test_frames_of_another_writing_of_the_same(folder: Path) -> None:
    store, size = store_over(folder), 2 * FRAME_BYTES
    await store.put("a", bytes_of(size))
    first = (folder / "a").read_bytes()
    await store.put("a", bytes_of(size))
    second = (folder / "a").read_bytes()
    assert first != second, "each writing has a salt of its own"
    (folder / "a").write_bytes(first[: 40 + STORED_FRAME] + second[40 + STORED_FRAME :])
    await refused(store_over(folder), "a", size)


async def test_another_key(folder: Path) -> None:
    await store_over(folder).put("a", bytes_of(1000))
    await refused(store_over(folder, bytes(32)), "a", 1000)
    with pytest.raises(InvalidParamsError, match="31 bytes"):
        store_over(folder, bytes(31))


async def test_plain_objects_are_not_taken_for_encrypted_ones(folder: Path) -> None:
    (folder / "plain").write_bytes(bytes_of(1000))
    (folder / "tiny").write_bytes(b"x")
    store = store_over(folder)
    for key in ("plain", "tiny"):
        with pytest.raises(OriginCorruptError):
            await store.get_range(key, 0, 1)
    with pytest.raises(OriginCorruptError, match="no encrypted object has 1 bytes"):
        await store.head("tiny")
    assert [info.key async for info in store.list()] == ["plain"], "by its size it could be one"


@pytest.mark.parametrize(("start", "end"), [(0, 1001), (1001, 1001), (5, 4), (-1, 5)])
async def test_ranges_that_are_not_there(folder: Path, start: int, end: int) -> None:
    store = store_over(folder)
    await store.put("a", bytes_of(1000))
    with pytest.raises(OriginCorruptError, match="1000"):
        await store.get_range("a", start, end)
    with pytest.raises(OriginCorruptError, match="1000"):
        await read_all(store.get_stream("a", start, end))


async def test_an_object_that_was_written_anew_by_another(folder: Path) -> None:
    store = store_over(folder)
    await store.put("a", bytes_of(1000))
    assert await store.get_range("a", 0, 10) == bytes_of(1000)[:10]
    for size in (1000, 5000, 50):
        await store_over(folder).put("a", bytes_of(size, seed=2))
        assert await store.get_range("a", 0, size) == bytes_of(size, seed=2)
    for size in (1000, 5000):
        await store_over(folder).put("a", bytes_of(size, seed=3))
        assert await read_all(store.get_stream("a", 0, size)) == bytes_of(size, seed=3)


async def test_what_is_not_there(folder: Path) -> None:
    store = store_over(folder)
    for call in (store.head("a"), store.get_range("a", 0, 1)):
        with pytest.raises(OriginNotFoundError):
            await call
    await store.put("a", b"x")
    await store.delete("a")
    with pytest.raises(OriginNotFoundError):
        await store.get_range("a", 0, 1)


async def test_the_least_size_follows_from_the_store_below(folder: Path) -> None:
    inner = FileStore(OriginUrl.parse(f"file://{folder}"))
    assert EncryptedStore(inner, KEY).min_object_bytes == 0
    inner.min_object_bytes = 127
    store = EncryptedStore(inner, KEY)
    assert stored_size(store.min_object_bytes) == 127


async def test_a_file_that_changes_under_way(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plain"
    path.write_bytes(bytes_of(1000))
    seal = EncryptedStore._seal

    def cut_and_seal(*args) -> None:
        os.truncate(path, 500)
        seal(*args)

    monkeypatch.setattr(EncryptedStore, "_seal", cut_and_seal)
    with pytest.raises(OriginError, match="changed in the meantime"):
        await store_over(folder).put("a", path)
    assert list(folder.iterdir()) == []


async def test_nothing_stays_behind(folder: Path, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    store = EncryptedStore(FileStore(OriginUrl.parse(f"file://{folder}")), KEY, spool)
    path = tmp_path / "plain"
    path.write_bytes(bytes_of(3 * FRAME_BYTES))
    await store.put("a", path)
    assert list(spool.iterdir()) == []
    missing = EncryptedStore(FileStore(OriginUrl.parse(f"file://{folder}")), KEY, tmp_path / "missing")
    with pytest.raises(OriginError, match="free disk"):
        await missing.put("b", path)


async def test_two_stores_read_each_other(folder: Path) -> None:
    await store_over(folder).put("a", bytes_of(100_000))
    (folder / "b").write_bytes(b"")
    assert await read_all(store_over(folder).get_stream("a", 99_000)) == bytes_of(100_000)[99_000:]


async def test_a_put_that_is_cancelled_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    spool, path = tmp_path / "spool", tmp_path / "plain"
    spool.mkdir()
    with path.open("wb") as file:
        file.truncate(1 << 30)
    store = EncryptedStore(FileStore(OriginUrl.parse(f"file://{folder}")), KEY, spool)
    task = asyncio.create_task(store.put("a", path))
    while not task.done() and not any(file.stat().st_size for file in spool.glob("*/object")):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(spool.iterdir()) == list(folder.iterdir()) == []
