"""Checkpoints at an S3 server, behind a proxy that counts and does wrong; savers that are killed."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.cli.demo.s3_server import S3Server
from protocol.errors import OriginError, OriginUnavailableError
from tests.support.bridge.forkserver import forkserver
from tests.support.bridge.o3_client import client_of, served
from tests.support.bridge.training import RUN, Training, assert_same_training, saves_until_killed
from tests.support.origins.proxy import Fault, OriginProxy
from tests.support.origins.s3_server import s3_server
from tests.support.waiting import wait_until
from torch_bridge import O3CheckpointManager, O3Client, RetryPolicy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]  # servers and processes of their own


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def proxy(server: S3Server) -> Iterator[OriginProxy]:
    with served(OriginProxy.running(server.endpoint, keys=(server.access_key, server.secret_key))) as proxy:
        yield proxy


@pytest.fixture
def url(server: S3Server, request: pytest.FixtureRequest) -> str:
    return f"o3://{server.bucket}/{re.sub('[^a-z0-9]+', '-', request.node.name)}"


def through(proxy: OriginProxy, server: S3Server) -> dict[str, Any]:
    return {
        "endpoint": proxy.endpoint,
        "access_key": server.access_key,
        "secret_key": server.secret_key,
        "backend": "gateway",
        "retry": RetryPolicy(total_s=3.0),
    }


@pytest.fixture
def checkpoints(proxy: OriginProxy, server: S3Server, url: str, tmp_path: Path) -> Iterator[O3CheckpointManager]:
    client = O3Client(**through(proxy, server))
    with O3CheckpointManager(url, client=client, key_file=tmp_path / "key", cache_dir=tmp_path / "c") as checkpoints:
        yield checkpoints


def test_training_goes_on_bit_equal_and_only_what_changed_is_sent(
    checkpoints: O3CheckpointManager, server: S3Server, url: str
) -> None:
    training = Training()
    training.steps(2)
    training.save(checkpoints, 0)
    with client_of(server) as direct:
        store = direct.at(url)
        before = {info.key: info.modified_s for info in store.list("shards/")}
        training.save(checkpoints, 1)
        assert {info.key: info.modified_s for info in store.list("shards/")} == before
        (first, second) = store.list("commits/")
        assert first.key < second.key
    training.steps(5)
    other = Training(seed=5)
    assert other.load(checkpoints).epoch == 1
    other.steps(5)
    assert_same_training(training, other)


def test_bytes_that_the_origin_gives_wrong_are_not_taken(
    checkpoints: O3CheckpointManager, proxy: OriginProxy, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training()
    training.save(checkpoints, 0)
    training.steps(1)
    training.save(checkpoints, 1)
    newest = checkpoints.latest(RUN)
    assert newest is not None
    part = newest.manifest.manifest.shards[0]
    proxy.rules.add(Fault(kind="wrong_bytes", key=part.content_id, offset=part.size // 2))
    other = Training(seed=5)
    with caplog.at_level(logging.WARNING):
        found = other.load(checkpoints)
    assert (found.epoch, len(found.fell_back_from)) == (0, 1)
    assert "IS DAMAGED" in caplog.text
    proxy.ledger.reset()
    proxy.rules.clear()
    assert other.load(checkpoints).epoch == 1
    assert proxy.ledger.payload_bytes("/shards/") == newest.total_bytes


def test_an_origin_that_is_away_is_no_damage(checkpoints: O3CheckpointManager, proxy: OriginProxy) -> None:
    training = Training()
    training.save(checkpoints, 0)
    proxy.rules.add(Fault(kind="status", status=503, key="/shards/"))
    with pytest.raises(OriginUnavailableError):
        training.load(checkpoints)
    with pytest.raises(OriginUnavailableError):
        checkpoints.latest(RUN)
    proxy.rules.clear()
    proxy.rules.add(Fault(kind="status", status=503, key="/shards/", times=2))
    assert training.load(checkpoints).fell_back_from == ()


@pytest.mark.parametrize(
    ("key", "methods"),
    [
        pytest.param("/shards/", ("HEAD",), marks=pytest.mark.slow),
        ("/shards/", ("PUT",)),
        pytest.param("/manifests/", ("PUT",), marks=pytest.mark.slow),
        ("/commits/", ("PUT",)),
    ],
)
def test_a_saver_that_is_killed_leaves_the_checkpoint_before(
    key: str,
    methods: tuple[str, ...],
    checkpoints: O3CheckpointManager,
    proxy: OriginProxy,
    server: S3Server,
    url: str,
    tmp_path: Path,
) -> None:
    expected = Training()
    context = forkserver()
    say, go_on = context.Queue(), context.Event()
    arguments = (through(proxy, server), url, str(tmp_path / "key"), str(tmp_path / "c"), say, go_on)
    child = context.Process(target=saves_until_killed, args=arguments)
    child.start()
    try:
        assert say.get(timeout=40) == "saved"
        # The first of the second save's requests of this kind is never answered.
        proxy.rules.add(Fault(kind="hang", key=key, methods=methods))
        go_on.set()
        assert say.get(timeout=20) == "sending"
        wait_until(lambda: proxy.rules.applied)
        assert proxy.rules.applied.keys() == {"hang"}
    finally:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(10)
    proxy.rules.clear()
    latest = checkpoints.latest(RUN)
    assert latest is not None
    assert latest.epoch == 0
    restored = Training(seed=5)
    assert restored.load(checkpoints).fell_back_from == ()
    assert_same_training(restored, expected)
    restored.steps(2)
    restored.save(checkpoints, 1)
    assert checkpoints.latest(RUN) == checkpoints.checkpoints(RUN)[0]
    assert [one.epoch for one in checkpoints.checkpoints(RUN)] == [1, 0]
    assert not (tmp_path / "c").exists(), "a killed saver leaves nothing on this machine's disk"


def test_an_error_of_the_origin_comes_out_as_it_was(checkpoints: O3CheckpointManager, proxy: OriginProxy) -> None:
    training = Training()
    proxy.rules.add(Fault(kind="status", status=403, key="/shards/", methods=("PUT",)))
    training.save(checkpoints, 0, wait=False)
    with pytest.raises(OriginError) as failed:
        checkpoints.wait()
    assert failed.value.details["status"] == "403"
    assert checkpoints.latest(RUN) is None
