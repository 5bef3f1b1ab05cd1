"""Checkpoints of several large parts: the origin is away for half a minute in the middle, or the saver is killed."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import torch

from node.cli.demo.s3_server import S3Server
from protocol.errors import OriginUnavailableError
from tests.support.bridge.forkserver import forkserver
from tests.support.bridge.o3_client import client_of
from tests.support.bridge.training import RUN, Training, assert_same, large_state, saves_large_until_killed
from tests.support.origins.s3_server import s3_server
from tests.support.waiting import wait_until
from tests.torch_bridge.core.test_origin_away import AWAY_S, Proxy, client_through, proxy
from torch_bridge import O3CheckpointManager, O3Client, RetryPolicy
from torch_bridge.core.store import Store

__all__ = ["proxy"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
PARTS = 6


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def url(weed: S3Server, request: pytest.FixtureRequest) -> str:
    return f"o3://{weed.bucket}/{re.sub('[^a-z0-9]+', '-', request.node.name)}"


@pytest.fixture
def direct(weed: S3Server, url: str) -> Iterator[Store]:
    """What is really there, past the proxy."""
    with client_of(weed) as client:
        yield client.at(url)


def impatient(through: Proxy, weed: S3Server) -> O3Client:
    return O3Client(
        endpoint=through.endpoint,
        access_key=weed.access_key,
        secret_key=weed.secret_key,
        backend="gateway",
        retry=RetryPolicy(total_s=3.0),
    )


def save(checkpoints: O3CheckpointManager, epoch: int, **options: Any) -> None:
    checkpoints.save_checkpoint(large_state(epoch), None, epoch, run_id=RUN, **options)


def test_a_save_outlasts_an_origin_that_is_away(
    weed: S3Server, proxy: Proxy, url: str, direct: Store, tmp_path: Path
) -> None:
    training = Training()
    with O3CheckpointManager(url, client=client_through(proxy, weed), key_file=tmp_path / "key") as checkpoints:
        proxy.hang("/shards/", "PUT")  # or it might be through before the origin is gone
        save(checkpoints, 0)
        wait_until(lambda: direct.list("shards/"), 60)
        began = time.monotonic()
        with proxy.away():
            training.steps(50)
            assert len(direct.list("shards/")) < PARTS, "the training went on in the middle of the save"
            checkpoints.wait()
        assert time.monotonic() - began > AWAY_S
        found = checkpoints.load_checkpoint(RUN)
    assert_same(found.state["model"], large_state(0))
    assert len(direct.list("shards/")) == PARTS


def test_a_save_that_gives_up_says_so_and_the_next_one_works(
    weed: S3Server, proxy: Proxy, url: str, direct: Store, tmp_path: Path
) -> None:
    training = Training()
    with O3CheckpointManager(url, client=impatient(proxy, weed), key_file=tmp_path / "key") as checkpoints:
        save(checkpoints, 0, wait=True)
        proxy.hang("/shards/", "PUT")
        save(checkpoints, 1)
        wait_until(lambda: len(direct.list("shards/")) > PARTS, 60)
        with proxy.away():
            training.steps(50)
            with pytest.raises(OriginUnavailableError, match=re.escape(url)):
                checkpoints.wait()
            training.steps(1)
        latest = checkpoints.latest(RUN)
        assert latest is not None
        assert latest.epoch == 0
        assert len(direct.list("commits/")) == 1
        save(checkpoints, 1, wait=True)
        found = checkpoints.load_checkpoint(RUN)
    assert (found.epoch, found.fell_back_from) == (1, ())
    assert_same(found.state["model"], large_state(1))


def test_a_restore_waits_for_it_or_gives_up_with_nothing_loaded(
    weed: S3Server, proxy: Proxy, url: str, tmp_path: Path
) -> None:
    with O3CheckpointManager(url, client=client_of(weed), key_file=tmp_path / "key") as checkpoints:
        save(checkpoints, 0, wait=True)
    patient = O3CheckpointManager(url, client=client_through(proxy, weed), key_file=tmp_path / "key")
    hasty = O3CheckpointManager(url, client=impatient(proxy, weed), key_file=tmp_path / "key")
    restored: dict[str, Any] = {}
    untouched: dict[str, Any] = {"mine": 1}
    with patient, hasty, ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(patient.load_checkpoint, RUN, model=restored)
        giving_up = pool.submit(hasty.load_checkpoint, RUN, model=untouched)
        wait_until(lambda: proxy.ask("sent")["payload_bytes"] > 8 << 20, 60)
        with proxy.away():
            assert not waiting.done()
            with pytest.raises(OriginUnavailableError):
                giving_up.result()
            assert waiting.result().fell_back_from == ()
        assert hasty.load_checkpoint(RUN, model=untouched).epoch == 0
    assert_same(restored, large_state(0))
    assert_same(untouched, large_state(0))


def test_a_saver_that_is_killed_in_the_middle_of_its_parts(
    weed: S3Server, proxy: Proxy, url: str, direct: Store, tmp_path: Path
) -> None:
    environment = {
        "endpoint": proxy.endpoint,
        "access_key": weed.access_key,
        "secret_key": weed.secret_key,
        "backend": "gateway",
    }
    context = forkserver()
    said, go_on = context.Queue(), context.Event()
    arguments = (environment, url, str(tmp_path / "key"), said, go_on)
    child = context.Process(target=saves_large_until_killed, args=arguments)
    child.start()
    try:
        assert said.get(timeout=60) == "saved"
        before = len(direct.list("shards/"))
        proxy.hang("/shards/", "PUT")
        go_on.set()
        assert said.get(timeout=60) == "sending"
        wait_until(lambda: len(direct.list("shards/")) > before and parts_under_way(weed), 60)
    finally:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(10)
    assert parts_under_way(weed) > 0, "an upload that was begun and never ended"
    assert before < len(direct.list("shards/")) < before + PARTS
    assert len(direct.list("commits/")) == 1
    with O3CheckpointManager(url, client=client_of(weed), key_file=tmp_path / "key") as checkpoints:
        latest = checkpoints.latest(RUN)
        assert latest is not None
        assert latest.epoch == 0
        assert_same(checkpoints.load_checkpoint(RUN).state["model"], {"weight": torch.ones(9)})
        checkpoints.save_checkpoint(large_state(), None, 1, run_id=RUN, wait=True)
        assert checkpoints.load_checkpoint(RUN).epoch == 1
    assert parts_under_way(weed) == 0, "the next save goes on with what was begun"


def parts_under_way(weed: S3Server) -> int:
    """Parts that the server has of uploads that nobody completed."""
    client = botocore.session.get_session().create_client(
        "s3",
        endpoint_url=weed.endpoint,
        aws_access_key_id=weed.access_key,
        aws_secret_access_key=weed.secret_key,
        region_name="us-east-1",
    )
    total = 0
    for upload in client.list_multipart_uploads(Bucket=weed.bucket).get("Uploads", []):
        where = {"Bucket": weed.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
        total += len(client.list_parts(**where).get("Parts", []))
    client.close()
    return total
