"""Origins that a manifest names, and starts while the origin is down."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from node.cli.demo.s3_server import S3Server
from node.origin.core.credentials import Credentials, Secret
from node.origin.settings import OriginSettings
from protocol.errors import InvalidShardError, OriginError, OriginNotFoundError
from protocol.manifest import Manifest
from tests.support.bridge.o3_client import client_of, served
from tests.support.bridge.shards import parquet_files, publish_at
from tests.support.origins.proxy import OriginProxy
from tests.support.origins.servers import hub_stand_in
from torch_bridge import O3Client, RetryPolicy, StreamingDownloader
from torch_bridge.shards.sources.origin import OriginSource

NAME = "tests/text"


def client_with_secrets(folder: Path, hub_port: int) -> O3Client:
    key = folder / "key"
    key.write_text("ab" * 32)
    settings = OriginSettings(
        hf_endpoint=f"http://127.0.0.1:{hub_port}",
        encryption_key_file=key,
        credentials=Credentials(hf_token=Secret("our-token"), o3_access_key=Secret("a"), o3_secret_key=Secret("b")),
    )
    return O3Client(settings=settings, retry=RetryPolicy(total_s=1.0))


def publish_without_shards(client: O3Client, folder: Path, paths: list[Path], origins: tuple[str, ...]) -> Manifest:
    manifest = publish_at(client.at(f"file://{folder}"), NAME, paths, origins)
    for shard in (folder / "shards").iterdir():
        shard.unlink()
    return manifest


def test_a_strangers_origin_gets_no_key_and_no_credential_and_some_are_not_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = parquet_files(tmp_path / "files", 2)
    (tmp_path / "base").mkdir()
    with served(hub_stand_in({path.name: path.read_bytes() for path in paths})) as hub:
        client = client_with_secrets(tmp_path, hub.port)
        secret = tmp_path / "secret"
        secret.mkdir()
        named = (
            f"file://{secret}",
            "http://10.0.0.1/x",
            "https://127.0.0.1/x",
            "https://localhost/x",
            "hf://datasets/some/data",
        )
        manifest = publish_without_shards(client, tmp_path / "base", paths, named)
        source = OriginSource(f"file://{tmp_path / 'base'}", tmp_path / "here", dataset=NAME, client=client)
        with caplog.at_level(logging.INFO):
            for entry, path in zip(manifest.shards, paths, strict=True):
                assert source.fetch(entry).path.read_bytes() == path.read_bytes(), "plain, by its file name"
        refused = [record.getMessage() for record in caplog.records if "is not asked" in record.getMessage()]
        for place in (str(secret), "http://10.0.0.1", "https://127.0.0.1/x", "https://localhost/x"):
            assert any(place in line for line in refused)
        assert hub.requests
        assert [headers for _, _, headers in hub.requests if "authorization" in headers] == []
        source.close()


def test_what_the_user_gave_gets_its_key_and_its_token(tmp_path: Path) -> None:
    paths = parquet_files(tmp_path / "files", 1)
    base = tmp_path / "base"
    base.mkdir()
    with served(hub_stand_in({})) as hub:
        client = client_with_secrets(tmp_path, hub.port)
        manifest = publish_at(client.at(f"file://{base}"), NAME, paths, ("hf://datasets/some/data/deeper",))
        assert (base / "shards" / manifest.shards[0].content_id).read_bytes() != paths[0].read_bytes()
        source = OriginSource(f"file://{base}", tmp_path / "here", dataset=NAME, client=client)
        assert source.fetch(manifest.shards[0]).path.read_bytes() == paths[0].read_bytes()
        address = OriginSource("hf://datasets/some/data/manifests/text/", tmp_path / "there", client=client)
        with pytest.raises(OriginError):
            address.manifest()
        assert any(headers.get("authorization") == "Bearer our-token" for _, _, headers in hub.requests)
        source.close()


def test_a_file_that_was_published_broken_is_set_aside_and_said(tmp_path: Path) -> None:
    (path,) = parquet_files(tmp_path / "files", 1)
    path.write_bytes(path.read_bytes()[:-3])
    (tmp_path / "base").mkdir()
    client = O3Client(settings=OriginSettings())
    (entry,) = publish_at(client.at(f"file://{tmp_path / 'base'}"), NAME, [path]).shards
    here = tmp_path / "here"
    source = OriginSource(f"file://{tmp_path / 'base'}", here, dataset=NAME, client=client)
    published = pytest.raises(InvalidShardError, match="bytes that were published")
    with StreamingDownloader(source, stop_free_bytes=0) as shards, published:
        shards.wait_for_shard(entry, 10)
    assert [file.name for file in here.glob("shard*")] == [f"{entry.filename}.bad-1"]


def test_a_start_while_the_origin_is_down_works_with_what_is_there(
    module_s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = module_s3
    with client_of(server) as client:
        publish_at(client.bucket(server.bucket), NAME, parquet_files(tmp_path / "files", 2))
        with served(OriginProxy.running(server.endpoint, keys=(server.access_key, server.secret_key))) as proxy:

            def start(folder: Path) -> OriginSource:
                again = O3Client(
                    endpoint=proxy.endpoint,
                    access_key=server.access_key,
                    secret_key=server.secret_key,
                    backend="gateway",
                    retry=RetryPolicy(total_s=0.2),
                )
                return OriginSource(f"o3://{server.bucket}", folder, dataset=NAME, client=again)

            first = start(tmp_path / "here")
            (known, missing) = first.manifest().shards
            first.fetch(known)
            endpoint = proxy.endpoint
        second = start(tmp_path / "here")  # the proxy is gone
        assert endpoint
        with StreamingDownloader(second, stop_free_bytes=0, retry_total_s=0.1, retry_first_s=0.05) as shards:
            assert "read last is used" in caplog.text
            assert shards.wait_for_shard(known, 10).stat().st_size == known.size
            with pytest.raises(OriginError):
                shards.wait_for_shard(missing, 20)
        with pytest.raises(OriginError):
            start(tmp_path / "elsewhere").manifest()


def test_a_manifest_that_was_damaged_on_disk_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    client = O3Client(settings=OriginSettings())
    where = f"file://{tmp_path / 'base'}"
    manifest = publish_at(client.at(where), NAME, parquet_files(tmp_path / "files", 1))
    (shard,) = manifest.shards
    source = OriginSource(where, tmp_path / "here", dataset=NAME, client=client)
    assert source.manifest() == manifest
    (kept,) = (tmp_path / "here" / ".shards").glob("manifest-*.json")
    kept.write_bytes(kept.read_bytes().replace(shard.filename.encode(), b"another_1.parquet"))
    assert OriginSource(where, tmp_path / "here", dataset=NAME, client=client).manifest() == manifest
    for found in (tmp_path / "base" / "shards").iterdir():
        found.unlink()
    with pytest.raises(OriginNotFoundError):
        source.fetch(shard)
    assert not list((tmp_path / "here").glob("shard*")), "nothing stays that was reserved"
