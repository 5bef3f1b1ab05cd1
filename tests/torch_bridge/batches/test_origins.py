"""StreamingBatchDataset over real origins: S3 behind a proxy that does wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.cli.demo.s3_server import S3Server
from protocol.errors import OriginUnavailableError
from tests.support.bridge.batches import bodies, dataset, name_and_body, sampled
from tests.support.bridge.o3_client import client_of, served
from tests.support.origins.proxy import Fault, OriginProxy
from tests.torch_bridge.batches.test_archives import pack
from torch_bridge import O3Client, RetryPolicy
from torch_bridge.batches.sources.archives import ArchiveFiles

FILES = bodies(12)
LARGE = {f"large/{number}.bin": bytes([number]) * 9_000_001 for number in range(3)}


@pytest.fixture(scope="module")
def weed(module_s3: S3Server) -> S3Server:
    with client_of(module_s3) as client:
        bucket = client.bucket(module_s3.bucket)
        for key, body in (FILES | LARGE | {"a.tar": pack("a.tar", FILES), "a.zip": pack("a.zip", FILES)}).items():
            bucket.put(key, body)
    return module_s3


@pytest.fixture
def proxy(weed: S3Server) -> Iterator[OriginProxy]:
    keys = weed.access_key, weed.secret_key
    with served(OriginProxy.running(weed.endpoint, keys=keys)) as proxy:
        yield proxy


def through(proxy: OriginProxy, weed: S3Server, total_s: float = 20.0) -> O3Client:
    return O3Client(
        endpoint=proxy.endpoint,
        access_key=weed.access_key,
        secret_key=weed.secret_key,
        backend="gateway",
        retry=RetryPolicy(total_s=total_s),
    )


def test_each_byte_leaves_the_origin_once_an_epoch_through_what_it_does_wrong(
    weed: S3Server, proxy: OriginProxy, tmp_path: Path
) -> None:
    proxy.rules.add(Fault(kind="status", status=503, times=3, key="clips/"))
    proxy.rules.add(Fault(kind="truncate", after_bytes=5000, times=3, key="clips/"))
    with through(proxy, weed) as client:
        files = dataset(client.bucket(weed.bucket, "clips"), tmp_path / "cache", decode=name_and_body)
        with sampled(tmp_path / "cache") as sizes:
            found = list(files)
    assert {f"clips/{name}": body for name, body, _ in found} == FILES
    assert max(count for _, count in sizes) <= 8
    total = sum(map(len, FILES.values()))
    assert total <= proxy.ledger.payload_bytes("clips/") <= total + 3 * 5000 + 10_000


def test_files_of_several_ranges(weed: S3Server, proxy: OriginProxy, tmp_path: Path) -> None:
    with through(proxy, weed) as client:
        files = dataset(
            client.bucket(weed.bucket, "large"),
            tmp_path / "cache",
            decode=name_and_body,
            max_bytes="20mb",
            cache_size=2,
        )
        with sampled(tmp_path / "cache") as sizes:
            assert {f"large/{name}": body for name, body, _ in files} == LARGE
    assert max(size for size, _ in sizes) <= 20_000_000


def test_an_origin_that_is_away_is_waited_for_or_told(weed: S3Server, proxy: OriginProxy, tmp_path: Path) -> None:
    with through(proxy, weed) as client:
        steps = iter(dataset(client.bucket(weed.bucket, "clips"), tmp_path / "cache", cache_size=1, concurrency=1))
        found = [next(steps)]
        proxy.rules.add(Fault(kind="status", status=503, key="clips/"))
        back = threading.Timer(0.5, proxy.rules.clear)
        back.start()
        found += steps
        back.join()
    assert sorted(found) == sorted(key.rpartition("/")[2] for key in FILES)
    proxy.rules.add(Fault(kind="status", status=503, key="clips/"))
    with through(proxy, weed, total_s=0.3) as client, pytest.raises(OriginUnavailableError, match="503"):
        list(dataset(client.bucket(weed.bucket, "clips"), tmp_path / "other"))


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_members_come_by_ranges(weed: S3Server, proxy: OriginProxy, tmp_path: Path, name: str) -> None:
    with through(proxy, weed) as client:
        files = ArchiveFiles(client.bucket(weed.bucket), [name])
        found = list(dataset(files, tmp_path / "cache", decode=name_and_body))
    assert {f"clips/{name}": body for name, body, _ in found} == FILES
