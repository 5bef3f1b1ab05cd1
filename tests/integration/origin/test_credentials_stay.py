"""Credentials of an origin, and URLs signed with them, never leave the node: not in what it says, writes or tells."""

from __future__ import annotations

import asyncio
import json
import os
import random
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from node.cli.demo.s3_server import S3Server
from node.discovery import Discovery, DiscoverySettings
from node.origin.factory import open_store
from protocol.errors import OriginDeniedError, ShoalError
from protocol.ids import ManifestDigest
from protocol.signing import SigningKey
from tests.support.daemons import Daemon, daemon
from tests.support.origins.presigned import presigned_url
from tests.support.origins.s3_server import credentials, s3_server, settings, typed
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]  # daemons and servers of their own

SECRET = "sEcRet-of-the-leak-test/+0123456789"  # with signs that are escaped in URLs and JSON
WRONG = "wRong-secret-of-the-leak-test/+98765"
ACCESS_KEY = "access-of-the-leak-test"
PRIVATE_KEY = "9c1d" * 16
TOKEN = "hf_ofTheLeakTest0123456789"
OTHER_PRIVATE_KEY, OTHER_TOKEN = "5e7a" * 16, "hf_inAFileOfTheLeakTest98765"
"""These two, and SECRET at one of the nodes, are given by files."""
NEVER = [
    word.encode()
    for word in (
        *(SECRET, WRONG, SECRET.replace("/", "%2F").replace("+", "%2B"), ACCESS_KEY),
        *(PRIVATE_KEY, TOKEN, OTHER_PRIVATE_KEY, OTHER_TOKEN, "X-Amz-Signature"),
    )
]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3"), access_key=ACCESS_KEY, secret_key=SECRET) as server:
        yield server


def check(where: str, data: bytes) -> None:
    assert data, f"nothing was looked at in {where}"
    for word in NEVER:
        assert word not in data, f"{word.decode()} is in {where}"


def everything_in(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size:
            yield str(path), path.read_bytes()


def by_file(folder: Path, **secrets: str) -> dict[str, str]:
    """The environment that names a file for each secret."""
    folder.mkdir(exist_ok=True)
    for name, secret in secrets.items():
        (folder / name).write_text(f"{secret}\n")
    return {f"{name}_FILE": str(folder / name) for name in secrets}


def page(node: Daemon, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{node.ports['http']}{path}", timeout=10) as answer:
        return answer.read()


def said(node: Daemon, signed_url: str) -> bytes:
    """All that a node tells who asks, its errors among it; one who asks has a signed URL and takes it for an origin."""
    answers: list[Any] = [node.call("STATUS"), node.call("LIST_FILES"), node.call("NODES")]
    for method, params in (
        ("GET_MANIFEST", {"name": "leaky"}),
        ("FETCH_SHARD", {"dataset": "leaky", "shard_id": 0}),
        ("FETCH_SHARD", {"dataset": "o3://shards/nothing/manifests/here/", "shard_id": 0}),
        ("FETCH_SHARD", {"dataset": signed_url, "shard_id": 0}),
    ):
        try:
            answers.append(node.call(method, params))
        except ShoalError as error:
            answers.append(error.to_wire())
    return json.dumps(answers, default=repr).encode() + page(node, "/metrics") + page(node, "/healthz")


async def values_of_the_dht(nodes: list[Daemon], digest: str) -> bytes:
    """Every record that a node which joins is told or given to keep, as it was sent."""
    settings_ = DiscoverySettings(
        cluster="default",
        advertise_host="127.0.0.1",
        bootstrap=tuple(("127.0.0.1", node.ports["dht"]) for node in nodes),
    )
    seen = b""
    async with Discovery.open(settings_, SigningKey.generate()) as discovery:
        for _ in range(50):
            await discovery.find_providers(ManifestDigest(digest))
            await discovery.find_name("leaky")
            await discovery.list_nodes()
            found = discovery._overlay.storage._keys
            seen = b"".join(kept.packed for kepts in found.values() for kept in kepts.values())
            if digest.encode() in seen:
                break
            await asyncio.sleep(0.1)
    assert digest.encode() in seen, "the name's record should be among them"
    return seen


def test_the_secrets_are_in_no_output_file_record_or_object(s3: S3Server, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "rows.bin").write_bytes(random.Random(3).randbytes(900_000))
    right, wrong = credentials(s3), credentials(s3, secret_key=WRONG)
    gateway = {"SHOAL_O3_BACKEND": "gateway"}
    files = by_file(tmp_path / "secrets", AKAVE_O3_SECRET_KEY=SECRET, AWS_SECRET_ACCESS_KEY=SECRET)
    of_a = {name: value for name, value in right.items() if f"{name}_FILE" not in files} | files | gateway
    of_a |= {"AKAVE_PRIVATE_KEY": PRIVATE_KEY, "HF_TOKEN": TOKEN}
    of_b = wrong | gateway
    of_b |= by_file(tmp_path / "secrets", AKAVE_PRIVATE_KEY=OTHER_PRIVATE_KEY, HF_TOKEN=OTHER_TOKEN)
    home = tmp_path / "publisher"
    command = ["publish", source, "--name", "leaky", "--data-dir", home, "--origin", "o3://shards/leaky", "--json"]
    refused = typed(wrong, *command)
    assert refused.returncode == 1
    assert "origin_denied" in refused.stderr
    assert "AKAVE_O3_SECRET_KEY" in refused.stderr, "what to look at"
    published = typed(right, *command)
    assert published.returncode == 0, published.stderr
    digest = json.loads(published.stdout)["digest"]
    with (
        daemon(tmp_path / "a", "--origin", "o3://shards/leaky", "--log-level", "debug", **of_a) as a,
        daemon(tmp_path / "b", "--origin", "o3://shards/leaky", "--log-level", "debug", **of_b) as b,
    ):
        fetched = a.call("FETCH_SHARD", {"dataset": "leaky", "shard_id": 0})
        assert fetched["source"] == "origin"
        wait_until(lambda: "seeding" in {file["state"] for file in a.files().values()})
        with pytest.raises(OriginDeniedError, match="403"):
            b.call("FETCH_SHARD", {"dataset": "o3://shards/leaky/manifests/leaky/", "shard_id": 0})
        signed = presigned_url(s3.endpoint, "shards/leaky/manifests/leaky/1.json", s3.access_key, s3.secret_key)
        assert "X-Amz-Signature=" in signed
        check("the answers of the node with the right keys", said(a, signed))
        check("the answers of the node with the wrong keys", said(b, signed))
        check("the records of the DHT", asyncio.run(values_of_the_dht([a], digest)))
        for node in (a, b):
            check("a command line", Path(f"/proc/{node.process.pid}/cmdline").read_bytes())
        verified = typed(right, "verify", "leaky", "--node", f"127.0.0.1:{a.ports['rpc']}", "--origin")
        denied = typed(wrong, "verify", "leaky", "--node", f"127.0.0.1:{a.ports['rpc']}", "--origin")
        at_signed = typed(right, "publish", source, "--name", "leaky", "--data-dir", home, "--origin", signed)
        assert at_signed.returncode == 2
        status = typed(right, "status", f"127.0.0.1:{a.ports['rpc']}", "--json")
        assert (verified.returncode, denied.returncode) == (0, 1), verified.stdout + denied.stdout
        assert "unchecked" in denied.stdout
    for what in (refused, published, verified, denied, at_signed, status):
        check(" ".join(map(str, what.args[:5])), (what.stdout + what.stderr).encode())
    for folder in (home, tmp_path / "a", tmp_path / "b"):
        for path, data in everything_in(folder):  # logs, manifests, indexes, resume data
            check(path, data)

    async def objects() -> list[tuple[str, bytes]]:
        store = open_store("o3://shards/leaky", settings(s3))
        try:
            found = [item async for item in store.list("")]
            return [(item.key, await store.get_range(item.key, 0, item.size)) for item in found]
        finally:
            await store.close()

    stored = asyncio.run(objects())
    assert {key.split("/")[0] for key, _ in stored} == {"shards", "torrents", "manifests"}
    for key, data in stored:
        check(key, data)


def test_the_test_would_notice(tmp_path: Path) -> None:
    for word in NEVER:
        with pytest.raises(AssertionError, match="is in a place"):
            check("a place", b"something " + word + os.urandom(4))
