"""What `publish --origin` brings to a real S3 server, a node that knows nobody starts from."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from node.cli.demo.s3_server import S3Server
from node.origin.factory import open_store
from node.origin.layout import encode_manifest, manifest_folder, shard_key, torrent_key
from node.origin.publishing import SourceFile, missing_at, publish
from node.shards.store.catalog import torrent_of
from protocol.content import hash_file
from protocol.errors import InvalidShardError, OriginNotFoundError
from protocol.manifest import Manifest, ShardEntry, manifest_from_wire, sign_manifest
from protocol.signing import SigningKey
from tests.support.daemons import Daemon, daemon
from tests.support.origins.s3_server import credentials, s3_server, settings, typed
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]  # daemons and servers of their own

KEY = SigningKey.generate()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def model(s3: S3Server, small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `publish --json` says of a model that lies at o3://shards/models and nowhere else."""
    home = tmp_path_factory.mktemp("publisher")
    said = typed(
        credentials(s3), "publish", small_shards, "--data-dir", home, "--origin", "o3://shards/models/",
        "--only-origin", "--json",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert not (home / "shards").exists()
    answer: dict[str, Any] = json.loads(said.stdout)
    assert answer["folder"] is None
    return answer


def files_of(folder: Path, count: int, size: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"part-{number}.bin").write_bytes(random.Random(f"{folder.name}{number}").randbytes(size + number))
    return folder


def source(path: Path) -> SourceFile:
    found = path.stat()
    return SourceFile(path, found.st_size, found.st_mtime_ns)


def objects(s3: S3Server, url: str) -> dict[str, int]:
    async def listed() -> dict[str, int]:
        store = open_store(url, settings(s3))
        try:
            return {item.key: item.size async for item in store.list("")}
        finally:
            await store.close()

    return asyncio.run(listed())


def test_shards_torrents_and_manifest_lie_at_the_origin_and_a_second_time_nothing_moves(
    s3: S3Server, tmp_path: Path
) -> None:
    folder = files_of(tmp_path / "set", 3, 600_000)
    (folder / "small.bin").write_bytes(b"less than a piece")
    command = ["publish", folder, "--name", "owner/my set", "--data-dir", tmp_path / "home", "--json"]
    command += ["--origin", "s3://shards/first", "--origin", f"file://{tmp_path}/second"]
    said = typed(credentials(s3), *command)
    assert said.returncode == 0, said.stderr
    answer = json.loads(said.stdout)
    assert [one["origin"] for one in answer["origins"]] == ["s3://shards/first", f"file://{tmp_path}/second"]
    local = Path(answer["folder"], "manifest.json")
    signed = manifest_from_wire(json.loads(local.read_text()), answer["digest"])
    assert signed.origins == ("s3://shards/first",), "a stranger would not read this machine's files"
    assert "does not name file://" in said.stderr
    expected = {torrent_key(e.content_id) for e in signed.manifest.shards if e.size > 300_000}
    expected |= {shard_key(entry.content_id) for entry in signed.manifest.shards}
    found = objects(s3, "s3://shards/first")
    assert len(expected) == 7
    assert expected < set(found)
    (manifest,) = set(found) - expected
    assert manifest.startswith(manifest_folder("owner/my set"))
    assert answer["origins"][0]["manifest_url"] == f"s3://shards/first/{manifest}"
    again = json.loads(typed(credentials(s3), *command).stdout)
    assert [one["uploaded_bytes"] for one in again["origins"]] == [0, 0]
    assert [one["manifest_url"] for one in again["origins"]] == [one["manifest_url"] for one in answer["origins"]]
    assert objects(s3, "s3://shards/first") == found
    # Without --origin the signed manifest stays; with another one it names both.
    assert typed({}, *command[:-4]).returncode == 0
    assert manifest_from_wire(json.loads(local.read_text())) == signed
    assert typed(credentials(s3), *command[:-4], "--origin", "o3://shards/third").returncode == 0
    assert manifest_from_wire(json.loads(local.read_text())).origins == ("o3://shards/third", "s3://shards/first")


def test_a_node_that_knows_nobody_loads_a_shard_by_name_from_the_origin(
    s3: S3Server, model: dict[str, Any], tmp_path: Path
) -> None:
    with daemon(tmp_path / "b", "--origin", "o3://shards/models", **credentials(s3)) as node:
        loaded = node.call("LOAD_SHARD", {"model": "smol", "shard_id": 1})
        assert loaded["source"] == "origin"
        assert loaded["bytes_by_source"].get("origin") == sum(loaded["bytes_by_source"].values()) == loaded["bytes"]
        origin = node.call("STATUS")["origin"]
        assert origin["urls"] == ["o3://shards/models"]
        assert loaded["bytes"] <= origin["downloaded_bytes"] < 1.05 * loaded["bytes"]
        assert origin["requests"] > 0
        assert origin["errors"] == 0
        with urlopen(f"http://127.0.0.1:{node.ports['http']}/metrics") as answer:
            metrics = answer.read().decode()
        assert "shoal_origin_errors_total 0.0" in metrics
        assert "shoal_origin_downloaded_bytes_total 0.0" not in metrics
        shown = typed({}, "status", f"127.0.0.1:{node.ports['rpc']}").stdout
        assert "o3://shards/models" in shown


def pulled(node: Daemon, s3: S3Server, what: str) -> dict[str, Any]:
    said = typed(credentials(s3), "pull", what, "--node", f"127.0.0.1:{node.ports['rpc']}", "--json")
    assert said.returncode == 0, said.stderr
    answer: dict[str, Any] = json.loads(said.stdout)
    return answer


def test_pull_by_name_and_by_address_on_nodes_that_know_nobody(s3: S3Server, tmp_path: Path) -> None:
    folder = files_of(tmp_path / "rows", 3, 700_000)
    said = typed(
        credentials(s3), "publish", folder, "--data-dir", tmp_path / "p", "--origin", "o3://shards/sets", "--json"
    )
    published = json.loads(said.stdout)
    address = published["origins"][0]["manifest_url"]
    with daemon(tmp_path / "by-name", "--origin", "o3://shards/sets", **credentials(s3)) as node:
        answer = pulled(node, s3, "rows")
        assert {one["source"] for one in answer["shards"]} == {"origin"}
        for file in folder.iterdir():
            assert (Path(answer["folder"]) / file.name).read_bytes() == file.read_bytes()
        assert {one["source"] for one in pulled(node, s3, "rows")["shards"]} == {"local"}
    # The manifest names the origin: a node that was told of none finds the shards.
    with daemon(tmp_path / "by-address", **credentials(s3)) as node:
        assert node.call("GET_MANIFEST", {"name": address.rpartition("/")[0]})["digest"] == published["digest"]
        assert {one["source"] for one in pulled(node, s3, address)["shards"]} == {"origin"}
        said = typed({}, "pull", "file:///etc/manifests/x/", "--node", f"127.0.0.1:{node.ports['rpc']}")
        assert said.returncode == 1
        assert "origin_denied" in said.stderr


def test_a_manifest_that_the_node_was_started_with_is_held(s3: S3Server, model: dict[str, Any], tmp_path: Path) -> None:
    address = f"o3://shards/models/{manifest_folder('smol')}"
    with daemon(tmp_path / "a", "--manifest", address, **credentials(s3)) as node:
        wait_until(lambda: "keeping manifest smol" in node.log)
        assert node.call("GET_MANIFEST", {})["digest"] == model["digest"], "the only model that it knows"
        fetched = node.call("FETCH_SHARD", {"model": "smol", "shard_id": 2})
        assert fetched["source"] == "origin"
    with daemon(tmp_path / "a") as node:  # also after a restart that does not name it
        wait_until(lambda: node.call("GET_MANIFEST", {"model": "smol"})["digest"] == model["digest"])


async def test_an_interrupted_publication_leaves_no_manifest_and_goes_on(s3: S3Server, tmp_path: Path) -> None:
    folder = files_of(tmp_path / "many", 12, 500_000)
    entries, files, torrents = [], {}, {}
    for shard_id, path in enumerate(sorted(folder.iterdir())):
        content = hash_file(path)
        entries.append(
            ShardEntry(
                shard_id=shard_id, filename=path.name, size=content.size, content_id=content.content_id, kind="file"
            )
        )
        files[content.content_id] = source(path)
        torrents[content.content_id] = torrent_of(entries[-1]).metainfo(content.piece_layer)
    manifest = Manifest(name="many", kind="dataset", shards=tuple(entries))
    signed = sign_manifest(manifest, KEY, ["s3://shards/interrupted"])
    store = open_store("s3://shards/interrupted", settings(s3))
    try:
        sent = 0

        def interrupt(count: int) -> None:
            nonlocal sent
            sent += count
            if sent > manifest.total_bytes / 3:
                publishing.cancel()

        missing = await missing_at(store, manifest)
        assert len(missing) == 12
        publishing = asyncio.create_task(publish(store, signed, missing, files, torrents, interrupt))
        with pytest.raises(asyncio.CancelledError):
            await publishing
        assert [item async for item in store.list("manifests/")] == []
        missing = await missing_at(store, manifest)
        assert 0 < len(missing) < 12
        done = await publish(store, signed, missing, files, torrents)
        assert done.uploaded_bytes == sum(one.bytes for one in missing)
        assert done.skipped_bytes == manifest.total_bytes - done.uploaded_bytes > 0
        assert await missing_at(store, manifest) == []
        newer = sign_manifest(manifest, SigningKey.generate())
        await publish(store, newer, [], {}, {})
        last = [item.key async for item in store.list(manifest_folder("many"))][-1]
        assert await store.get_range(last, 0, (await store.head(last)).size) == encode_manifest(newer, 0)
    finally:
        await store.close()


async def test_a_file_that_changes_while_it_is_sent_is_not_left_under_its_content_id(
    s3: S3Server, tmp_path: Path
) -> None:
    path = files_of(tmp_path / "one", 1, 300_000) / "part-0.bin"
    content = hash_file(path)
    entry = ShardEntry(shard_id=0, filename=path.name, size=content.size, content_id=content.content_id, kind="file")
    manifest = Manifest(name="one", kind="dataset", shards=(entry,))
    store = open_store("s3://shards/changed", settings(s3))
    try:
        missing = await missing_at(store, manifest)
        torrents = {content.content_id: torrent_of(entry).metainfo(content.piece_layer)}
        with pytest.raises(InvalidShardError, match="was changed"):
            await publish(
                store,
                sign_manifest(manifest, KEY),
                missing,
                {content.content_id: source(path)},
                torrents,
                lambda _: path.write_bytes(bytes(content.size)) and None,
            )
        with pytest.raises(OriginNotFoundError):
            await store.head(shard_key(content.content_id))
        for body in (b"short", bytes(content.size)):
            was = source(path)
            path.write_bytes(body)
            with pytest.raises(InvalidShardError, match="was changed since it was hashed"):
                await publish(store, sign_manifest(manifest, KEY), missing, {content.content_id: was}, torrents)
        assert [item async for item in store.list("manifests/")] == []
    finally:
        await store.close()


def verified(node: Daemon | None, environment: dict[str, str], *arguments: str) -> tuple[int, dict[str, Any]]:
    target = f"127.0.0.1:{node.ports['rpc'] if node else 9}"
    said = typed(environment, "verify", "checked", "--node", target, "--json", *arguments)
    return said.returncode, json.loads(said.stdout) if said.stdout else {"error": said.stderr}


def test_verify_finds_a_damaged_object_and_a_damaged_local_copy(s3: S3Server, tmp_path: Path) -> None:
    folder = files_of(tmp_path / "checked", 3, 400_000)
    home = tmp_path / "a"
    said = typed(credentials(s3), "publish", folder, "--data-dir", home, "--origin", "s3://shards/checked", "--json")
    assert said.returncode == 0, said.stderr
    manifest = json.loads(said.stdout)["manifest"]
    with daemon(home, **credentials(s3)) as node:
        wait_until(lambda: [file["state"] for file in node.files().values()] == ["seeding"] * 3)
        code, answer = verified(node, credentials(s3), "--origin")
        assert (code, answer["ok"], len(answer["copies"])) == (0, True, 6), answer
        path = home / "shards" / "checked" / "part-1.bin"
        path.unlink()  # it is a link to the source
        data = (folder / "part-1.bin").read_bytes()
        before = (folder / "part-1.bin").stat()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # only its bytes tell
        code, answer = verified(node, credentials(s3), "--origin")
        wrong = [copy for copy in answer["copies"] if copy["state"] != "good"]
        assert [(copy["state"], copy["shard_id"]) for copy in wrong] == [("damaged", 1)]
        assert (code, answer["ok"], answer["without_copy"]) == (1, False, [])
        first, second, third = (shard["content_id"] for shard in manifest["shards"])

        async def spoil() -> None:
            store = open_store("s3://shards/checked", settings(s3))
            size = manifest["shards"][0]["size"]
            await store.put(shard_key(first), bytes(size))
            await store.delete(shard_key(second))
            torrent = await store.get_range(torrent_key(third), 0, (await store.head(torrent_key(third))).size)
            await store.put(torrent_key(third), torrent[:-3] + bytes([torrent[-3] ^ 1]) + torrent[-2:])
            await store.close()

        asyncio.run(spoil())
        code, answer = verified(node, credentials(s3), "--at", "s3://shards/checked")
        at_origin = [copy["state"] for copy in answer["copies"] if copy["where"] == "s3://shards/checked"]
        assert (code, at_origin) == (1, ["damaged", "missing", "damaged"])
        assert answer["without_copy"] == [1]
        shown = typed(credentials(s3), "verify", "checked", "--node", f"127.0.0.1:{node.ports['rpc']}", "--origin")
        assert shown.returncode == 1
        assert "no good copy was found of: 1" in shown.stdout
    code, answer = verified(None, credentials(s3), "--at", "s3://shards/checked")
    assert (code, [copy["state"] for copy in answer["copies"]]) == (1, ["damaged", "missing", "damaged"])
    code, answer = verified(None, {})
    assert code == 1
    assert "--at URL" in answer["error"]
