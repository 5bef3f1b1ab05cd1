"""Data sets and checkpoints over a bucket with keys that cannot be read among those that can."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from node.cli.demo.s3_server import S3Server
from node.origin.s3.access import S3Access
from node.origin.s3.botocore_client import S3ApiClient
from node.origin.s3.errors import S3ErrorTranslator
from node.origin.url import OriginUrl
from protocol.errors import InvalidParamsError
from tests.support.bridge.batches import dataset, folder_of
from tests.support.bridge.o3_client import client_of, in_fork, served
from tests.support.origins.odd_bucket import GOOD, REFUSED, STORED_BY_SEAWEED, odd_bucket, odd_objects
from tests.support.origins.servers import settings_of
from torch_bridge import O3CheckpointManager, O3Client, RetryPolicy
from torch_bridge.checkpoints.dcp import O3StorageReader, O3StorageWriter
from torch_bridge.core.store import Store
from torch_bridge.objects.dataset import O3Dataset

SORTED = sorted(GOOD, key=str.encode)


def put_odd(server: S3Server, url: str, keys: tuple[str, ...] = STORED_BY_SEAWEED) -> None:
    """Put objects of these keys, and a folder marker, as other programs do."""
    where = OriginUrl.parse(url)

    async def put() -> None:
        access = S3Access.of(where, settings_of(server))
        async with S3ApiClient(access, S3ErrorTranslator(url, "")) as client:
            for key, body in {**dict.fromkeys(keys, b"x" * 200), "": b"", "empty/": b""}.items():
                await client.call("put_object", "write", key, {"Key": f"{where.prefix}/{key}", "Body": body})

    asyncio.run(put())


@contextmanager
def stand_in() -> Iterator[tuple[Store, int]]:
    with served(odd_bucket(odd_objects("data/"))) as bucket:
        client = O3Client(
            endpoint=bucket.endpoint,
            access_key="access",
            secret_key="a-secret-key",
            backend="gateway",
            retry=RetryPolicy(total_s=5.0),
        )
        with client:
            yield client.at("o3://shards/data"), len(REFUSED)


@contextmanager
def seaweed(server: S3Server) -> Iterator[tuple[Store, int]]:
    with client_of(server) as client:
        store = client.bucket(server.bucket, "data")
        for key in GOOD:
            store.put(key, f"data/{key}".encode().ljust(200))
        put_odd(server, store.url)
        yield store, len(STORED_BY_SEAWEED)


@contextmanager
def folder(path: Path) -> Iterator[tuple[Store, int]]:
    odd = ("a\n1", os.fsdecode(b"latin-\xe9"))
    yield folder_of(path, {key: f"data/{key}".encode(errors="replace") for key in (*GOOD, *odd)}), len(odd)


@pytest.fixture(params=["stand-in", "seaweed", "folder"])
def odd(request: pytest.FixtureRequest, module_s3: S3Server, tmp_path: Path) -> Iterator[tuple[Store, int]]:
    """A store with GOOD and odd keys, and how many are odd."""
    makers = {"stand-in": stand_in, "seaweed": lambda: seaweed(module_s3), "folder": lambda: folder(tmp_path / "data")}
    with makers[request.param]() as found:
        yield found


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    caplog.clear()
    return found


def test_each_object_that_can_be_read_comes_once(
    odd: tuple[Store, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, count = odd
    assert [info.key for info in store.list()] == SORTED
    (message,) = warned(caplog)
    assert f"leaves out {count} of {count + len(GOOD)} objects" in message
    assert repr("a\n1") in message
    if not store.url.startswith("file:"):
        assert in_fork(lambda: [info.key for info in store.list()]) == SORTED

    bucket, client = store.url, O3Client(settings=store.location.settings, retry=RetryPolicy(total_s=5.0))
    with client:
        objects = O3Dataset(bucket, "", client, tmp_path / "objects")
        assert list(objects.keys) == SORTED
        assert [bytes(body).rstrip() for body in objects] == [f"data/{key}".encode() for key in SORTED]  # type: ignore[attr-defined]
        assert sum("leaves out" in message for message in warned(caplog)) == 1

        files = dataset(client.at(bucket), tmp_path / "files", decode=lambda path, _: path.read_bytes().rstrip())
        assert sorted(files) == sorted(f"data/{key}".encode() for key in GOOD)
        assert sum("leaves out" in message for message in warned(caplog)) == 1
        with pytest.raises(InvalidParamsError, match="copy the object to such a key"):
            client.at(bucket).get("a\n1")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_checkpoints_are_found_among_odd_keys(
    module_s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"o3://{module_s3.bucket}/checkpoints"
    with (
        client_of(module_s3) as client,
        O3CheckpointManager(url, client=client, key_file=tmp_path / "key", cache_dir=tmp_path / "c") as manager,
    ):
        for epoch in range(2):
            manager.save_checkpoint(torch.nn.Linear(2, 2), None, epoch, run_id="run", rng=False, wait=True)
            put_odd(module_s3, f"{url}/commits/run")
        caplog.clear()
        assert [commit.epoch for commit in manager.checkpoints("run")] == [1, 0]
        (message,) = warned(caplog)
        assert f"leaves out {len(STORED_BY_SEAWEED)} of" in message

        store = client.at(url)
        put_odd(module_s3, f"{url}/dcp/run")
        for value in (3.0, 5.0):
            dcp.save({"weights": torch.full((2,), value)}, storage_writer=O3StorageWriter(store, "run"))
        state = {"weights": torch.zeros(2)}
        dcp.load(state, storage_reader=O3StorageReader(store, "run"))
        assert state["weights"].tolist() == [5.0, 5.0]
