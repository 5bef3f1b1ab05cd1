"""Names of objects at an origin, and what is read out of torrent files and manifests that lie there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.origin.layout import (
    decode_manifest,
    encode_manifest,
    layer_bytes,
    layer_in_torrent,
    manifest_folder,
    manifest_key,
    max_torrent_bytes,
    parse_manifest_key,
    split_address,
)
from node.origin.url import checked_key
from node.swarm.torrent import Torrent
from protocol.content import LEAF_BYTES, ContentHash, hash_file, is_piece_layer
from protocol.errors import InvalidManifestError
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import Manifest, ShardEntry, sign_manifest
from protocol.signing import SigningKey

DIGEST = ManifestDigest("ab" * 32)
SAFE = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-~"


def entry_of(path: Path, content: ContentHash) -> ShardEntry:
    return ShardEntry(shard_id=0, filename=path.name, size=content.size, content_id=content.content_id, kind="file")


def test_manifest_names_say_time_and_digest_and_sort_by_time() -> None:
    key = manifest_key("owner/smol", DIGEST, 1_700_000_000_000)
    assert key == f"manifests/owner/smol/1700000000000-{DIGEST}.json"
    assert parse_manifest_key(key) == (1_700_000_000_000, DIGEST, key)
    older = parse_manifest_key(manifest_key("owner/smol", ManifestDigest("ff" * 32), 999))
    newer = parse_manifest_key(key)
    assert older is not None
    assert newer is not None
    assert older < newer
    for other in ("manifests/smol/1700-ab.json", "manifests/smol/manifest.json", key + "x", key.replace("ab", "AB")):
        assert parse_manifest_key(other) is None


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\x00"), min_size=1, max_size=200))
def test_a_folder_of_any_name_is_a_key_of_safe_characters_and_its_own(name: str) -> None:
    folder = manifest_folder(name)
    component = folder.removeprefix("manifests/").removesuffix("/")
    assert set(component) <= set(SAFE)
    assert len(component) <= 200
    checked_key(f"{folder}x.json")
    if set(name) <= set(SAFE) - {"~"} and len(name) <= 100 and name.strip("."):
        assert component == name
    assert manifest_folder(name + "~") != folder


@pytest.mark.parametrize("size", [1, LEAF_BYTES, LEAF_BYTES + 1, 256 * 1024, 256 * 1024 + 1, 900_001, 5 << 18])
def test_the_layer_of_a_torrent_file_is_found_and_leads_to_the_content_id(tmp_path: Path, size: int) -> None:
    path = tmp_path / "12:piece layersd1:x"  # a name that looks like what is searched for
    path.write_bytes(os.urandom(size))
    content = hash_file(path)
    entry = entry_of(path, content)
    torrent = Torrent.of(path.name, size, content.content_id).metainfo(content.piece_layer)
    assert len(torrent) <= max_torrent_bytes(size)
    assert layer_in_torrent(torrent, content.content_id) == content.piece_layer
    assert len(content.piece_layer) == layer_bytes(size)
    assert is_piece_layer(content.piece_layer, entry.size, entry.content_id)
    assert layer_in_torrent(torrent, ContentId("00" * 32)) == b""
    if content.piece_layer:
        wrong = bytes([content.piece_layer[0] ^ 1]) + content.piece_layer[1:]
        assert not is_piece_layer(wrong, entry.size, entry.content_id)
        assert layer_in_torrent(torrent[:-40], content.content_id) == b""


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader_of_torrent_files(data: bytes) -> None:
    for torrent in (data, b"d" + data, b"d4:info" + data, b"l" * 5000 + data, b"d12:piece layersd32:" + data):
        assert isinstance(layer_in_torrent(torrent, ContentId("61" * 32)), bytes)


def test_a_manifest_comes_back_through_its_padding_and_an_unsigned_one_is_refused() -> None:
    entry = ShardEntry(shard_id=0, filename="a.bin", size=5, content_id=ContentId("cd" * 32), kind="file")
    manifest = Manifest(name="set", kind="dataset", shards=(entry,))
    signed = sign_manifest(manifest, SigningKey.generate(), ["o3://bucket/prefix"])
    body = encode_manifest(signed, 5000)
    assert len(body) == 5000
    assert decode_manifest(body) == signed
    assert encode_manifest(signed, 0) == body.rstrip(b" ")
    with pytest.raises(InvalidManifestError, match="not signed"):
        decode_manifest(json.dumps({"manifest": json.loads(body)["manifest"]}).encode())
    for bad in (b"", b"[1]", b"{", body[:-4600], body.replace(b"bucket", b"packet")):
        with pytest.raises(InvalidManifestError):
            decode_manifest(bad)


def test_an_address_is_split_into_origin_and_key() -> None:
    assert split_address("o3://b/p/manifests/smol/1-a.json") == ("o3://b/p", "manifests/smol/1-a.json")
    assert split_address("o3://b/manifests/owner/smol/") == ("o3://b", "manifests/owner/smol/")
    assert split_address("https://h.example/smol/manifest.json") == ("https://h.example/smol", "manifest.json")
    assert split_address("o3://b/p/manifests/a%20b") == ("o3://b/p", "manifests/a b")


@pytest.mark.parametrize("name", ["smol", "owner/smol", "owner/manifests", "manifests", "manifests/smol", "x.json"])
def test_every_name_leads_back_to_its_origin(name: str) -> None:
    key = manifest_key(name, DIGEST, 7)
    if name != "manifests/smol":  # as well the name smol under the prefix manifests
        assert split_address(f"o3://b/{key}") == ("o3://b", key)
        assert split_address(f"o3://b/{manifest_folder(name)}") == ("o3://b", manifest_folder(name))
    assert "/".join(split_address(f"o3://b/{key}")) == f"o3://b/{key}"
