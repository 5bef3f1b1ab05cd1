"""Shards straight from an S3 server, behind a proxy that counts and does wrong."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.cli.demo.s3_server import S3Server
from protocol.content import hash_file
from protocol.errors import (
    InsufficientDiskError,
    InvalidShardError,
    OriginCorruptError,
    OriginNotFoundError,
    TimedOutError,
)
from protocol.manifest import Manifest
from tests.support.bridge.o3_client import client_of, served
from tests.support.bridge.shards import overwrite_in_the_middle, parquet_files, publish_at
from tests.support.origins.proxy import Fault, OriginProxy
from torch_bridge import O3Client, RetryPolicy
from torch_bridge.shards import disk_space
from torch_bridge.shards.downloader import StreamingDownloader
from torch_bridge.shards.sources import origin as origin_source
from torch_bridge.shards.sources import range_download
from torch_bridge.shards.sources.factory import open_source
from torch_bridge.shards.sources.origin import OriginSource

NAME = "tests/text"


@pytest.fixture(scope="module")
def published(module_s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[S3Server, Manifest]:
    paths = parquet_files(tmp_path_factory.mktemp("files"), 5)
    with client_of(module_s3) as client:
        return module_s3, publish_at(client.bucket(module_s3.bucket), NAME, paths)


@pytest.fixture
def proxy(published: tuple[S3Server, Manifest]) -> Iterator[OriginProxy]:
    server = published[0]
    with served(OriginProxy.running(server.endpoint, keys=(server.access_key, server.secret_key))) as proxy:
        yield proxy


@pytest.fixture
def slow_proxy(published: tuple[S3Server, Manifest]) -> Iterator[OriginProxy]:
    server = published[0]
    keys = server.access_key, server.secret_key
    with served(OriginProxy.running(server.endpoint, keys=keys, rate_bytes_s=25_000)) as proxy:
        yield proxy


def source_of(proxy: OriginProxy, server: S3Server, folder: Path) -> OriginSource:
    client = O3Client(
        endpoint=proxy.endpoint,
        access_key=server.access_key,
        secret_key=server.secret_key,
        backend="gateway",
        retry=RetryPolicy(total_s=10.0),
    )
    source = open_source(f"o3://{server.bucket}", NAME, folder=folder, client=client)
    assert isinstance(source, OriginSource)
    return source


def test_an_epoch_streams_and_a_restart_moves_nothing(
    published: tuple[S3Server, Manifest], proxy: OriginProxy, tmp_path: Path
) -> None:
    server, manifest = published
    source = source_of(proxy, server, tmp_path)
    with StreamingDownloader(source, buffer_size=2, max_buffer=2, stop_free_bytes=0, keep_behind=1) as shards:
        for entry in manifest.shards:
            path = shards.wait_for_shard(entry, 20)
            assert path.stat().st_size == entry.size
            assert len(list(tmp_path.glob("*.parquet"))) <= 4
            shards.consumed(entry)
        assert [path.name for path in tmp_path.glob("*.parquet")] == [manifest.shards[-1].filename]
    assert proxy.ledger.payload_bytes("/shards/") == manifest.total_bytes
    again = source_of(proxy, server, tmp_path).fetch(manifest.shards[-1])
    assert again.source == "local"
    assert proxy.ledger.payload_bytes("/shards/") == manifest.total_bytes


def test_a_wrong_byte_is_never_handed_out(
    published: tuple[S3Server, Manifest], proxy: OriginProxy, tmp_path: Path
) -> None:
    server, manifest = published
    source, entry = source_of(proxy, server, tmp_path), manifest.shards[0]
    source.manifest()
    proxy.rules.add(Fault(kind="wrong_bytes", offset=1000, key="/shards/", times=1))
    with pytest.raises(OriginCorruptError, match="content id"):
        source.fetch(entry)
    assert not (tmp_path / entry.filename).exists()
    assert (tmp_path / f"{entry.filename}.bad-1").exists()
    path = source.fetch(entry).path
    assert source.distrust(entry, "a reader says so") is False
    assert source.fetch(entry).source == "local", "its bytes are those that were published"
    overwrite_in_the_middle(path)
    assert source.distrust(entry, "a reader says so") is True
    assert source.fetch(entry).source == "origin"
    assert hash_file(path).content_id == entry.content_id


def test_a_file_that_a_power_cut_left_with_other_bytes_is_found_at_the_next_start(
    published: tuple[S3Server, Manifest], proxy: OriginProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, manifest = published
    entry = manifest.shards[0]
    path = source_of(proxy, server, tmp_path).fetch(entry).path
    before = path.stat()
    overwrite_in_the_middle(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.setattr(origin_source, "_boot", lambda: "another start of the machine")
    assert source_of(proxy, server, tmp_path).fetch(entry).source == "origin"
    assert hash_file(path).content_id == entry.content_id
    assert source_of(proxy, server, tmp_path).fetch(entry).source == "local"


def test_a_reader_that_cannot_decode_a_file_gets_it_anew_once(
    published: tuple[S3Server, Manifest], proxy: OriginProxy, tmp_path: Path
) -> None:
    server, manifest = published
    entry = manifest.shards[3]
    with StreamingDownloader(source_of(proxy, server, tmp_path), [entry], stop_free_bytes=0) as shards:
        overwrite_in_the_middle(shards.wait_for_shard(entry, 20))
        shards.distrust(entry, "a row group does not decode")
        assert hash_file(shards.wait_for_shard(entry, 20)).content_id == entry.content_id
        shards.distrust(entry, "it still does not decode")
        with pytest.raises(InvalidShardError, match="still does not decode"):
            shards.wait_for_shard(entry, 20)
    assert (tmp_path / f"{entry.filename}.bad-1").exists()
    assert proxy.ledger.payload_bytes("/shards/") == 2 * entry.size


def test_a_full_disk_is_said_before_a_byte_moves(
    published: tuple[S3Server, Manifest], proxy: OriginProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, manifest = published
    source = source_of(proxy, server, tmp_path)
    source.manifest()
    monkeypatch.setattr(disk_space, "free_bytes", lambda _: 10)
    with pytest.raises(InsufficientDiskError, match="10 are free"):
        source.fetch(manifest.shards[0])
    assert proxy.ledger.payload_bytes("/shards/") == 0


def test_a_shard_that_the_origin_lost_is_one_error_and_the_others_go_on(
    published: tuple[S3Server, Manifest], proxy: OriginProxy, tmp_path: Path
) -> None:
    server, manifest = published
    lost, *others = manifest.shards
    proxy.rules.add(Fault(kind="status", status=404, key=lost.content_id))
    with StreamingDownloader(source_of(proxy, server, tmp_path), stop_free_bytes=0) as shards:
        assert shards.wait_for_shard(others[0], 20).exists()
        with pytest.raises(OriginNotFoundError):
            shards.wait_for_shard(lost, 20)


def _fetch(source: OriginSource, number: int, said: Any) -> None:
    range_download.RANGE_BYTES = 16 * 1024
    found = source.fetch(source.manifest().shards[number])
    said.put((found.source, sum(found.bytes_by_source.values())))


def test_a_download_that_is_killed_goes_on_where_it_was(
    published: tuple[S3Server, Manifest], slow_proxy: OriginProxy, proxy: OriginProxy, tmp_path: Path
) -> None:
    server, manifest = published
    source, entry = source_of(slow_proxy, server, tmp_path), manifest.shards[1]
    source.manifest()
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    child = context.Process(target=_fetch, args=(source, 1, said))
    part = tmp_path / f"{entry.filename}.part"
    child.start()
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(10)
    kept = part.stat().st_size
    assert 0 < kept < entry.size
    found = source_of(proxy, server, tmp_path).fetch(entry)
    assert sum(found.bytes_by_source.values()) == entry.size - kept


def test_two_processes_share_one_download(
    published: tuple[S3Server, Manifest], proxy: OriginProxy, tmp_path: Path
) -> None:
    server, manifest = published
    source = source_of(proxy, server, tmp_path)
    source.manifest()
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    children = [context.Process(target=_fetch, args=(source, 2, said)) for _ in range(2)]
    for child in children:
        child.start()
    answers = sorted(said.get(timeout=20) for _ in children)
    for child in children:
        child.join(10)
    assert answers == [("local", 0), ("origin", manifest.shards[2].size)]
    assert proxy.ledger.payload_bytes(manifest.shards[2].content_id) == manifest.shards[2].size


def test_a_source_travels_by_pickle(published: tuple[S3Server, Manifest], proxy: OriginProxy, tmp_path: Path) -> None:
    source = source_of(proxy, published[0], tmp_path)
    source.manifest()
    assert pickle.loads(pickle.dumps(source)).manifest() == published[1]


def test_an_origin_that_is_gone_for_a_while_is_waited_for(
    published: tuple[S3Server, Manifest], proxy: OriginProxy, tmp_path: Path
) -> None:
    server, manifest = published
    source = source_of(proxy, server, tmp_path)
    source.manifest()
    proxy.rules.add(Fault(kind="status", status=503, key="/shards/"))
    with StreamingDownloader(source, [0], stop_free_bytes=0) as shards:
        with pytest.raises(TimedOutError, match=r"shard_00000\.parquet was not here within 0.3 s"):
            shards.wait_for_shard(0, 0.3)
        proxy.rules.clear()
        assert shards.wait_for_shard(0, 30).stat().st_size == manifest.shards[0].size
