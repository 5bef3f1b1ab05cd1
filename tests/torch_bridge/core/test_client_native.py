"""O3Client over the stand-in of the akavesdk (tests/support/akavesdk_standin); buckets; what torch_bridge exports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import torch_bridge
from node.origin.akave.cid import CHUNK_BYTES
from protocol.errors import InvalidParamsError, OriginDeniedError, OriginError
from tests.support.origins.akave_parts import BUCKET, NODE, PRIVATE_KEY, settings, standin_network, without_sdk
from torch_bridge import O3Client, RetryPolicy


@pytest.fixture
def network() -> Iterator[Any]:
    with standin_network() as network:
        yield network


def test_the_native_backend_reads_bytes_and_hands_out_the_sdks_own_object(network: Any) -> None:
    client = O3Client(backend="native", private_key=PRIVATE_KEY, settings=settings(), retry=RetryPolicy(total_s=2.0))
    with client:
        assert client.create_bucket("runs") is True
        assert client.create_bucket("runs") is False
        assert client.list_buckets() == sorted([BUCKET, "runs"])
        with pytest.raises(OriginError, match="natively"):
            client.delete_bucket("runs")
        body = bytes(range(256)) * 1000
        store = client.bucket("runs", "a")
        store.put("x", body)
        assert store.get_range("x", 1000, 1010) == body[1000:1010]
        assert store.get_ranges("x", [(7, 9), (200_000, 200_005)]) == [body[7:9], body[200_000:200_005]]
        assert store.get("x") == body
        assert store.backing.range_unit_bytes == CHUNK_BYTES

        ipc = client.ipc()
        assert ipc is client.ipc()
        assert ipc.file_info(None, "runs", "a/x").actual_size == len(body)
        assert type(ipc).__module__.split(".")[0] == "sdk"
    assert ipc is not client.ipc(), "closed with the client"
    client.close()
    assert NODE in network.nodes


def test_without_the_sdk_there_is_no_ipc(monkeypatch: pytest.MonkeyPatch) -> None:
    without_sdk(monkeypatch)
    with pytest.raises(OriginError, match="akavesdk is not installed"):
        O3Client(private_key=PRIVATE_KEY).ipc()


def test_without_a_key_there_is_no_ipc(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AKAVE_PRIVATE_KEY", raising=False)
    with pytest.raises(OriginDeniedError, match="AKAVE_PRIVATE_KEY"):
        O3Client().ipc()


def test_a_forked_child_of_a_process_with_the_sdk_is_refused(network: Any) -> None:
    # In a process of its own: once used, the SDK counts as used for all later forks of this one.
    program = (
        "import os; from tests.support.origins.akave_parts import *; from torch_bridge import O3Client\n"
        "from protocol.errors import OriginError\n"
        "with standin_network():\n"
        "    client = O3Client(backend='native', settings=settings()); client.list_buckets()\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        try: client.list_buckets()\n"
        "        except OriginError as error: os.write(1, error.message.encode())\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert "would hang; start processes by spawn" in done.stdout


def test_keys_go_together_and_urls_are_looked_at_early() -> None:
    with pytest.raises(InvalidParamsError, match="go together"):
        O3Client(access_key="a")
    with pytest.raises(InvalidParamsError, match="expected"):
        O3Client().at("ftp://example.org")
    client = O3Client()
    assert client.bucket("bb", "a b/ü?").url == client.at("o3://bb/a%20b/%C3%BC%3F/").url
    assert client.bucket("bb", "/x/") is client.at("o3://bb/x")


def test_public_names_come_when_they_are_asked_for_and_torch_not_before() -> None:
    program = (
        "import sys, torch_bridge; torch_bridge.O3Client, torch_bridge.RetryPolicy\n"
        "print([name for name in ('torch', 'obstore', 'botocore', 'aiohttp') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "[]\n"
    assert {"O3Client", "O3Dataset", "O3CheckpointManager"} <= set(dir(torch_bridge))
    with pytest.raises(AttributeError, match="no attribute 'O3Klient'"):
        _ = torch_bridge.O3Klient
