"""`shoal check-o3` as a person types it, against a real server: good keys, bad ones, none, and nobody there."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from node.cli.check_o3 import Check
from node.cli.demo.s3_server import S3Server
from node.origin.buckets import create_bucket, delete_bucket, list_buckets
from node.origin.factory import open_store
from node.origin.settings import OriginSettings
from tests.support.origins import akave_parts
from tests.support.origins.s3_server import credentials, s3_server, settings

slow = pytest.mark.slow
"""A server of its own, and a process for each command."""
STEPS = ["credentials", "bucket create", "bucket list", "put", "ranged get", "head", "delete", "bucket delete"]


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


def typed(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment
    return subprocess.run(
        [sys.executable, "-m", "node", "check-o3", *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=env,
    )


@slow
def test_good_keys_pass_every_step_and_nothing_is_left(weed: S3Server) -> None:
    done = typed(credentials(weed), "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"], done.stderr) == (0, True, "")
    assert [step["name"] for step in found["steps"]] == STEPS
    assert asyncio.run(list_buckets("o3", settings(weed))) == [weed.bucket]
    asyncio.run(create_bucket("o3", "kept", settings(weed)))
    done = typed(credentials(weed), "--bucket", "kept")
    assert done.returncode == 0, done.stdout
    assert "kept was there before" in done.stdout
    assert done.stdout.endswith("all is well\n")
    assert asyncio.run(list_buckets("o3", settings(weed))) == ["kept", weed.bucket]
    assert asyncio.run(_keys("o3://kept", settings(weed))) == []
    asyncio.run(delete_bucket("o3", "kept", settings(weed)))


@slow
def test_a_bucket_that_was_made_is_left_if_asked_for(weed: S3Server) -> None:
    assert typed(credentials(weed), "--bucket", "made-here", "--keep-bucket").returncode == 0
    assert "made-here" in asyncio.run(list_buckets("o3", settings(weed)))
    asyncio.run(delete_bucket("o3", "made-here", settings(weed)))


@slow
@pytest.mark.parametrize(
    ("changed", "hint"),
    [
        ({"AKAVE_O3_SECRET_KEY": "not-this-one"}, "secret key is another one"),
        ({"AKAVE_O3_ACCESS_KEY": "nobody"}, "does not know the access key"),
        ({"AKAVE_O3_ACCESS_KEY": "", "AKAVE_O3_SECRET_KEY": ""}, "set the variables"),
        ({"AKAVE_O3_SECRET_KEY": ""}, "set the variables"),
        ({"SHOAL_O3_ENDPOINT": "http://127.0.0.1:1"}, "nothing answers at this endpoint"),
    ],
)
def test_what_is_wrong_is_said_with_a_hint_and_no_secret(weed: S3Server, changed: dict[str, str], hint: str) -> None:
    done = typed(credentials(weed) | changed, "--patience", "0.3")
    assert done.returncode == 1
    assert "FAILED  credentials" in done.stdout
    assert hint in done.stdout.split("hint: ")[1]
    assert "1 failed, 6 skipped" in done.stdout
    assert "Traceback" not in done.stderr
    for secret in (weed.secret_key, "not-this-one"):
        assert secret not in done.stdout + done.stderr


@slow
def test_what_cannot_begin_exits_with_2(weed: S3Server) -> None:
    done = typed(credentials(weed), "--endpoint", "nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert "https://HOST" in done.stderr


async def _keys(url: str, settings: OriginSettings) -> list[str]:
    store = open_store(url, settings)
    try:
        return [one.key async for one in store.list()]
    finally:
        await store.close()


async def test_a_connection_is_checked_natively_too() -> None:
    with akave_parts.standin_network():
        settings = akave_parts.settings(o3_backend="native", retry_total_s=2.0)
        check = Check(settings, None, lambda _: None)
        await check.run(keep_bucket=False)
        assert check.ok, check.steps
        assert "is left" in check.steps[-1].found
        assert check.bucket in await list_buckets("o3", settings)
        assert await _keys(f"o3://{check.bucket}", settings) == []
