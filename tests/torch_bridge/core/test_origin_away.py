"""An origin that refuses connections for half a minute in the middle of an epoch, with every setting as it comes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from node.cli.demo.s3_server import S3Server
from tests.support.bridge.o3_client import client_of
from tests.support.bridge.streaming import NAME, numbered_files, numbers, publish_numbered
from tests.support.origins.s3_server import s3_server
from torch_bridge import O3Client
from torch_bridge.objects.dataset import O3Dataset, RecordFormat
from torch_bridge.shards.sources.origin import OriginSource

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),  # 30 s of nothing, and as long to notice that it is over
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torch's own DataLoader
]
ROOT = Path(__file__).resolve().parents[3]
AWAY_S = 30.0
ROWS = [60, 35, 80, 52, 40, 60, 20, 75, 61, 60]
ALL = sorted(shard * 1000 + row for shard, rows in enumerate(ROWS) for row in range(rows))
RECORD = 10_000
BODIES = {f"{at}.bin": random.Random(at).randbytes(RECORD * 120) for at in range(3)}
RECORDS = [body[at : at + RECORD] for body in BODIES.values() for at in range(0, len(body), RECORD)]


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    paths = numbered_files(tmp_path_factory.mktemp("files"), ROWS)
    with s3_server(tmp_path_factory.mktemp("weed")) as server, client_of(server) as client:
        publish_numbered(client.bucket(server.bucket), paths)
        for name, body in BODIES.items():
            client.bucket(server.bucket, "records").put(name, body)
        yield server


class Proxy:
    """tests/support/origins/proxy.py, in a process of its own as an origin is."""

    def __init__(self, said: dict[str, str]) -> None:
        self.endpoint, self._control = said["endpoint"], said["control"]

    def ask(self, what: str) -> Any:
        method = "GET" if what == "sent" else "POST"
        with urllib.request.urlopen(urllib.request.Request(f"{self._control}/{what}", method=method), timeout=10) as a:
            return json.loads(a.read() or b"null")

    def hang(self, key: str, method: str) -> None:
        """The next such request is never answered, as long as its connection lasts."""
        rule = json.dumps({"kind": "hang", "key": key, "methods": [method], "times": 1}).encode()
        request = urllib.request.Request(f"{self._control}/faults", data=rule, method="POST")
        urllib.request.urlopen(request, timeout=10).close()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Gone at once, and back after AWAY_S, whatever happens meanwhile."""
        self.ask("gone")
        back = threading.Timer(AWAY_S, self.ask, ["back"])
        back.start()
        try:
            yield
        finally:
            back.join()


@pytest.fixture
def proxy(weed: S3Server) -> Iterator[Proxy]:
    command = [sys.executable, "-m", "tests.support.origins.proxy", "--upstream", weed.endpoint]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield Proxy(json.loads(process.stdout.readline()))
        finally:
            process.terminate()


def client_through(proxy: Proxy, weed: S3Server) -> O3Client:
    """With the retries that a user gets who names none."""
    return O3Client(endpoint=proxy.endpoint, access_key=weed.access_key, secret_key=weed.secret_key, backend="gateway")


def went_through(proxy: Proxy, batches: Iterable[Any], before: int) -> list[Any]:
    """All batches; behind so many the origin goes, and it must have been missed."""
    steps = iter(batches)
    found = [next(steps) for _ in range(before)]
    began, longest_s = time.monotonic(), 0.0
    with proxy.away():
        for batch in steps:
            found.append(batch)
            longest_s, began = max(longest_s, time.monotonic() - began), time.monotonic()
    assert AWAY_S / 2 < longest_s < AWAY_S + 30, "what was there was used, and then it was waited"
    return found


def test_streaming_shards_wait_for_it(weed: S3Server, proxy: Proxy, tmp_path: Path) -> None:
    source = OriginSource(f"o3://{weed.bucket}", tmp_path, dataset=NAME, client=client_through(proxy, weed))
    data = numbers(source)
    found = went_through(proxy, DataLoader(data, batch_size=None, num_workers=2), 6)
    assert sorted(sample for batch in found for sample in batch["id"].tolist()) == ALL
    assert len(found) == data.order().batches
    assert list(tmp_path.glob("*.parquet*")) == []
    sent, shards = proxy.ask("sent"), sum(entry.size for entry in source.manifest().shards)
    assert shards <= sent["payload_bytes"] < 1.1 * shards + 100_000, "what came before is not fetched again"


def test_o3_dataset_waits_for_it(weed: S3Server, proxy: Proxy, tmp_path: Path) -> None:
    data = O3Dataset(
        weed.bucket,
        "records",
        client_through(proxy, weed),
        tmp_path,
        format=RecordFormat(RECORD),
        chunk_bytes=65536,
        request_bytes=65536,
    )
    loader = DataLoader(data, batch_size=8, num_workers=2, collate_fn=list)
    found = went_through(proxy, loader, 6)
    assert [record for batch in found for record in batch] == RECORDS
