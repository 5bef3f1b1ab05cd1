"""scripts/check_o3.py as a person types it, against a real server: good keys, bad ones, none, and nobody there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.cli.demo.s3_server import S3Server
from tests.support.bridge.o3_client import client_of
from tests.support.origins.s3_server import credentials, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]  # servers and processes of their own

SCRIPT = Path(__file__).parents[3] / "scripts" / "check_o3.py"
STEPS = ["credentials", "bucket create", "bucket list", "put", "ranged get", "head", "delete", "bucket delete"]


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("weed")) as server:
        yield server


def typed(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=50, check=False, env=env
    )


def test_good_keys_pass_every_step_and_nothing_is_left(weed: S3Server) -> None:
    done = typed(credentials(weed), "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"], done.stderr) == (0, True, "")
    assert [step["name"] for step in found["steps"]] == STEPS
    with client_of(weed) as client:
        assert client.list_buckets() == [weed.bucket]
        client.create_bucket("kept")
        done = typed(credentials(weed), "--bucket", "kept")
        assert done.returncode == 0, done.stdout
        assert "kept was there before" in done.stdout
        assert done.stdout.endswith("all is well\n")
        assert client.list_buckets() == ["kept", weed.bucket]
        assert client.bucket("kept").list() == []
        client.delete_bucket("kept")


def test_a_bucket_that_was_made_is_left_if_asked_for(weed: S3Server) -> None:
    assert typed(credentials(weed), "--bucket", "made-here", "--keep-bucket").returncode == 0
    with client_of(weed) as client:
        assert "made-here" in client.list_buckets()
        client.delete_bucket("made-here")


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


def test_what_cannot_begin_exits_with_2(weed: S3Server) -> None:
    done = typed(credentials(weed), "--endpoint", "nonsense")
    assert (done.returncode, done.stdout) == (2, "")
    assert "https://HOST" in done.stderr
