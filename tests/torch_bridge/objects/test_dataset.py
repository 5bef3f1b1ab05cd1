"""O3Dataset over a real S3 server, through a proxy that counts what leaves it and fails on demand."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from node.cli.demo.s3_server import S3Server
from protocol.errors import (
    InsufficientMemoryError,
    InvalidParamsError,
    InvalidShardError,
    OriginCorruptError,
    OriginError,
    OriginNotFoundError,
)
from tests.support.bridge.o3_client import client_of, served
from tests.support.bridge.shards import file_at_whose_footer_pyarrow_aborts
from tests.support.origins.proxy import OriginProxy
from tests.support.origins.s3_server import credentials
from torch_bridge import O3Client, RetryPolicy
from torch_bridge.objects.dataset import O3Dataset, ParquetFormat, RecordFormat
from torch_bridge.objects.parquet import ParquetRows

RECORD = 10_000
PER_OBJECT = 120
BODIES = {f"{at}.bin": random.Random(at).randbytes(RECORD * PER_OBJECT) for at in range(3)}
RECORDS = [body[at : at + RECORD] for body in BODIES.values() for at in range(0, len(body), RECORD)]
SMALL = {"chunk_bytes": 65536, "request_bytes": 262144, "format": RecordFormat(RECORD)}


@pytest.fixture(scope="module")
def weed(module_s3: S3Server) -> S3Server:
    with client_of(module_s3) as client:
        for name, body in BODIES.items():
            client.bucket(module_s3.bucket, "records").put(name, body)
    return module_s3


@pytest.fixture
def proxy(weed: S3Server) -> Iterator[OriginProxy]:
    with served(OriginProxy.running(weed.endpoint, keys=(weed.access_key, weed.secret_key))) as one:
        yield one


@pytest.fixture
def client(weed: S3Server, proxy: OriginProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[O3Client]:
    for name, value in credentials(weed).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHOAL_O3_ENDPOINT", proxy.endpoint)
    with O3Client(endpoint=proxy.endpoint, backend="gateway", retry=RetryPolicy(total_s=20.0)) as one:
        yield one


def files(folder: Path, bodies: dict[str, bytes]) -> str:
    folder.mkdir()
    for name, body in bodies.items():
        (folder / name).write_bytes(body)
    return folder.as_uri()


def as_tensor(record: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(record), dtype=torch.uint8)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=[pytest.mark.slow, pytest.mark.timeout(180)])])
def test_workers_of_both_kinds_fetch_each_byte_once_and_a_second_epoch_fetches_none(
    weed: S3Server, proxy: OriginProxy, client: O3Client, tmp_path: Path, method: str
) -> None:
    dataset = O3Dataset(weed.bucket, "records", client, tmp_path, decode=as_tensor, **SMALL)
    loader = DataLoader(dataset, batch_size=16, num_workers=2, persistent_workers=True, multiprocessing_context=method)
    for epoch in range(2):
        got = [row.numpy().tobytes() for batch in loader for row in batch]
        assert got == RECORDS
        assert proxy.ledger.payload_bytes(".bin") == sum(map(len, BODIES.values())), f"epoch {epoch}"


def test_many_threads_that_miss_the_same_chunks_fetch_them_once(
    weed: S3Server, proxy: OriginProxy, client: O3Client, tmp_path: Path
) -> None:
    sets = [O3Dataset(weed.bucket, "records", client, tmp_path, **SMALL) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: one.__getitems__(range(len(one))), sets))
    assert all(got == RECORDS for got in found)
    assert proxy.ledger.payload_bytes(".bin") == sum(map(len, BODIES.values()))
    assert sum(one.stats().origin_bytes for one in sets) == sum(map(len, BODIES.values()))


def test_one_record_costs_its_chunks_and_adjacent_chunks_one_request(
    weed: S3Server, proxy: OriginProxy, client: O3Client, tmp_path: Path
) -> None:
    dataset = O3Dataset(weed.bucket, "records", client, tmp_path, **SMALL)
    assert dataset[6] == RECORDS[6]  # across the first border between chunks
    assert (dataset.stats().origin_bytes, dataset.stats().origin_requests) == (2 * 65536, 1)
    deadline = time.monotonic() + 5  # the proxy counts in its own thread, a moment after the bytes have gone
    while proxy.ledger.payload_bytes("0.bin") < 2 * 65536 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert proxy.ledger.payload_bytes("0.bin") == 2 * 65536
    assert dataset[-1] == RECORDS[-1]
    with pytest.raises(IndexError, match="360 was asked for, and the data set has 360"):
        dataset[360]
    with pytest.raises(IndexError):
        dataset[-361]


def test_who_reads_on_finds_what_was_read_ahead_and_each_byte_leaves_once(
    client: O3Client, proxy: OriginProxy, weed: S3Server, tmp_path: Path
) -> None:
    data = O3Dataset(weed.bucket, "records", client, tmp_path, cache_limit="8MiB", read_ahead="1MiB", **SMALL)
    read = [data.__getitems__(range(at, at + 10)) for at in range(0, 30, 10)]
    deadline = time.monotonic() + 20
    while proxy.ledger.payload_bytes("/records/") <= 5 * 65536 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert proxy.ledger.payload_bytes("/records/") > 5 * 65536, "30 records lie in 5 chunks"
    for batch in DataLoader(data, 10, num_workers=2, multiprocessing_context="fork", collate_fn=list):
        assert batch[0] in RECORDS
    read += [data.__getitems__(range(at, at + 10)) for at in range(30, len(data), 10)]
    assert [one for batch in read for one in batch] == RECORDS
    assert data.stats().origin_bytes <= proxy.ledger.payload_bytes("/records/") == sum(map(len, BODIES.values()))


def test_an_origin_that_is_down_for_a_while(
    weed: S3Server, proxy: OriginProxy, client: O3Client, tmp_path: Path
) -> None:
    dataset = O3Dataset(weed.bucket, "records", client, tmp_path, **SMALL)
    assert dataset[0] == RECORDS[0]
    loop = proxy._runner.server._loop  # type: ignore[union-attr]
    asyncio.run_coroutine_threadsafe(proxy.gone(), loop).result(5)
    back = threading.Timer(0.7, lambda: asyncio.run_coroutine_threadsafe(proxy.back(), loop))
    back.start()
    assert dataset[0] == RECORDS[0]  # what is here needs no origin
    assert dataset.__getitems__(range(360)) == RECORDS
    back.join()


def test_the_listing_is_kept_renewed_and_outlives_its_origin(
    weed: S3Server, proxy: OriginProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"access_key": weed.access_key, "secret_key": weed.secret_key, "endpoint": proxy.endpoint}
    client = O3Client(backend="gateway", retry=RetryPolicy(total_s=0.3), **keys)  # type: ignore[arg-type]
    client.bucket(weed.bucket, "growing").put("a", b"a" * RECORD)

    def opened(ttl_s: float) -> O3Dataset:
        return O3Dataset(weed.bucket, "growing", client, tmp_path, listing_ttl_s=ttl_s, **SMALL)

    assert len(opened(60)) == 1
    client.bucket(weed.bucket, "growing").put("b", b"b" * RECORD)
    assert len(opened(60)) == 1
    assert opened(0).keys == ("a", "b")
    loop = proxy._runner.server._loop  # type: ignore[union-attr]
    asyncio.run_coroutine_threadsafe(proxy.gone(), loop).result(5)
    with caplog.at_level(logging.WARNING, "torch_bridge"):
        assert len(opened(0)) == 2
    assert "the listing of" in caplog.text
    (path,) = tmp_path.glob("*/metadata.json")
    assert [one[0] for one in json.loads(path.read_text())["objects"]] == ["a", "b"]
    path.write_text(path.read_text()[:-9])
    with pytest.raises(OriginError):
        opened(60)
    client.close()


def test_a_changed_object_gives_no_old_bytes_and_a_lost_one_is_named(tmp_path: Path) -> None:
    url = files(tmp_path / "o", {"a": b"a" * RECORD, "b": b"b" * RECORD})
    dataset = O3Dataset(url, "", O3Client(), tmp_path / "cache", **SMALL)
    assert dataset[0] == b"a" * RECORD
    (tmp_path / "o" / "a").write_bytes(b"c" * RECORD)
    anew = O3Dataset(url, "", O3Client(), tmp_path / "cache", listing_ttl_s=0, **SMALL)
    assert anew[0] == b"c" * RECORD
    (tmp_path / "o" / "b").write_bytes(b"d" * RECORD)
    with pytest.raises(OriginCorruptError, match=r"b at .* has changed since it was listed"):
        anew[1]
    (tmp_path / "o" / "b").unlink()
    with pytest.raises(OriginNotFoundError, match=r"it was there when .* was listed"):
        dataset[1]


def test_what_makes_no_data_set_says_so(tmp_path: Path) -> None:
    url = files(tmp_path / "o", {"a": b"a" * (RECORD + 1)})
    with pytest.raises(OriginNotFoundError, match=r"no object matches '\*\.parquet'"):
        O3Dataset(url, "", O3Client(), tmp_path / "cache", format=ParquetFormat())
    with pytest.raises(InvalidShardError, match="a has 10001 bytes"):
        O3Dataset(url, "", O3Client(), tmp_path / "cache", **SMALL)
    with pytest.raises(InvalidShardError, match="a is not a parquet file"):
        O3Dataset(url, "", O3Client(), tmp_path / "cache", format=ParquetFormat(pattern="*"))
    with pytest.raises(InvalidParamsError, match="concurrency"):
        O3Dataset(url, "", O3Client(), tmp_path / "cache", 0)
    whole = O3Dataset(url, "", O3Client(), tmp_path / "cache", decode=len)
    assert [*pickle.loads(pickle.dumps(whole))] == [RECORD + 1]


def test_parquet_reads_the_columns_and_row_groups_that_are_asked_for(tmp_path: Path) -> None:
    def table(first: int) -> pa.Table:
        rows = range(first, first + 1000)
        heavy = [random.Random(row).randbytes(2000) for row in rows]
        return pa.table({"id": list(rows), "heavy": heavy, "text": [f"row {row}" for row in rows]})

    (tmp_path / "o").mkdir()
    for at in range(2):
        pq.write_table(table(at * 1000), tmp_path / "o" / f"{at}.parquet", row_group_size=100)
    url, form = (tmp_path / "o").as_uri(), ParquetFormat(columns=("id", "text"))
    dataset = O3Dataset(url, "", O3Client(), tmp_path / "cache", format=form, chunk_bytes=4096)
    assert len(dataset) == 2000
    footers = dataset.stats().origin_bytes
    order = random.Random(5).sample(range(2000), 300)
    assert dataset.__getitems__(order) == [{"id": row, "text": f"row {row}"} for row in order]
    assert dataset.stats().origin_bytes - footers < 20 * 5 * 4096  # 20 row groups of 200 KB, without the heavy column
    again: Any = pickle.loads(pickle.dumps(dataset))
    assert again[1999] == {"id": 1999, "text": "row 1999"}
    assert again.stats().origin_bytes == 0
    with pytest.raises(InvalidParamsError, match=r"no column none: it has id, heavy, text"):
        O3Dataset(url, "", O3Client(), tmp_path / "cache", format=ParquetFormat(columns=("none",)))
    (table_one,) = O3Dataset(url, "", O3Client(), tmp_path / "cache", format=ParquetFormat()).__getitems__([150])
    assert table_one["heavy"] == random.Random(150).randbytes(2000)


def nested(path: Path) -> Path:
    pq.write_table(pa.table({"id": [1, 2, 3], "tags": [[1, 2], [3], []]}), path)
    return path


def test_a_footer_at_which_pyarrow_aborts_is_an_error_that_names_the_object(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    file_at_whose_footer_pyarrow_aborts(tmp_path / "o" / "bad.parquet")
    url = (tmp_path / "o").as_uri()
    dataset = O3Dataset(url, "", O3Client(), tmp_path / "cache", format=ParquetFormat())
    with pytest.raises(InvalidShardError, match=r"row group 0 of bad.parquet cannot be read .*upload the file again"):
        dataset[0]
    rest = O3Dataset(url, "", O3Client(), tmp_path / "cache", format=ParquetFormat(columns=("id",)))
    assert [row["id"] for row in rest] == [1, 2, 3]


def test_a_row_group_that_cannot_be_decoded_is_named_and_memory_is_no_fault_of_the_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o").mkdir()
    path = nested(tmp_path / "o" / "bad.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(40) + whole[44:])  # the first page's header
    url = (tmp_path / "o").as_uri()
    dataset = O3Dataset(url, "", O3Client(), tmp_path / "cache", format=ParquetFormat())
    with pytest.raises(InvalidShardError, match=r"row group 0 of bad.parquet cannot be read"):
        dataset[0]

    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise pa.ArrowMemoryError("malloc of size 1099511627776 failed")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", out_of_memory)
    with pytest.raises(InsufficientMemoryError, match=r"row group 0 of bad.parquet .*fewer columns="):
        dataset[0]


def test_the_ranges_that_are_fetched_are_those_of_the_column_chunks(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    table = pa.table({"x": [0.5] * 900, "tags": [[1, 2], [3], []] * 300, "s": [{"a": 1, "b": "c"}] * 900})
    pq.write_table(table, path := tmp_path / "o" / "one.parquet", row_group_size=300)
    dataset = O3Dataset((tmp_path / "o").as_uri(), "", O3Client(), tmp_path / "cache", format=ParquetFormat())
    rows, meta = dataset._samples, pq.read_metadata(path)
    assert isinstance(rows, ParquetRows)
    for group in range(3):
        chunks = [meta.row_group(group).column(column) for column in range(meta.num_columns)]
        starts = [min(one.data_page_offset, one.dictionary_page_offset or 1 << 60) for one in chunks]
        expected = [(start, start + one.total_compressed_size) for start, one in zip(starts, chunks, strict=True)]
        assert [(one.start, one.end) for one in rows._ranges(dataset._reader, 0, group)] == expected
