"""What lies in the folder, manifests on disk, and where a fetched one may go."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from node.files import Fingerprint
from node.shards.store.layout import link_or_copy, prepare_folder, remove_if_empty, set_aside
from node.shards.store.listing import classify, list_files
from node.shards.store.manifests import (
    LocalManifest,
    folder_names,
    read_manifest,
    shard_path,
    sign_loose,
    write_manifest,
)
from protocol.errors import InvalidManifestError
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import ShardEntry, sign_manifest
from tests.support.shards.parts import KEY, OTHER_KEY, manifest_of, write_shard, write_unsigned

DIGEST = ManifestDigest("ab" * 32)


def entry(filename: str, shard_id: int = 0) -> ShardEntry:
    return ShardEntry(shard_id=shard_id, filename=filename, size=1, content_id=ContentId("00" * 32), kind="file")


def names(listing: object) -> set[str]:
    assert isinstance(listing, dict)
    return {name for files in listing.values() for name in files}


def test_listing_skips_hidden_unfinished_deep_and_foreign_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("a.gguf", ".hidden.gguf", "b.gguf.part", "c.parquet.tmp", "d.gguf.invalid", ".dir/e.gguf", "f/g.gguf"):
        write_shard(root / name)
    write_shard(root / "1/2/3/deep.gguf")
    outside = write_shard(tmp_path / "outside.gguf")
    (root / "link.gguf").symlink_to(outside)
    (root / "inside.gguf").symlink_to(root / "a.gguf")
    (root / "broken.gguf").symlink_to(root / "nothing")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.gguf")
    assert names(list_files(root, max_depth=2)) == {"a.gguf", "g.gguf", "inside.gguf"}
    assert "deep.gguf" in names(list_files(root))


def test_listing_is_bounded(tmp_path: Path) -> None:
    for folder in range(5):
        for name in range(3):
            write_shard(tmp_path / str(folder) / f"{name}.bin", 1)
    assert len(names(list_files(tmp_path, max_files=4))) < 15


def test_a_manifest_owns_the_files_that_it_names_and_the_others_are_loose(tmp_path: Path) -> None:
    for name in ("rows.bin", "x.parquet", "y.parquet", "readme.txt"):
        write_shard(tmp_path / name)
    signed = sign_manifest(manifest_of(tmp_path, "rows.bin", "x.parquet"), KEY)
    write_unsigned(tmp_path, signed.manifest)
    found = classify(list_files(tmp_path), {tmp_path: LocalManifest(tmp_path, signed, Fingerprint(1, 1))})
    assert {path.name: file.shard.entry.shard_id if file.shard else None for path, file in found.items()} == {
        "rows.bin": 0,
        "x.parquet": 1,
        "y.parquet": None,
    }
    assert {path.name for path in classify(list_files(tmp_path), {})} == {"x.parquet", "y.parquet"}


def test_an_unsigned_manifest_is_signed_and_a_signed_one_keeps_its_publisher(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.parquet")
    manifest = manifest_of(tmp_path, "x.parquet")
    write_unsigned(tmp_path, manifest)
    read = read_manifest(tmp_path / "manifest.json", KEY)
    assert read is not None
    assert (read.publisher, read.digest) == (KEY.node_id, manifest.digest)
    write_manifest(tmp_path, sign_manifest(manifest, OTHER_KEY))
    read = read_manifest(tmp_path / "manifest.json", KEY)
    assert read is not None
    assert (read.publisher, read.digest) == (OTHER_KEY.node_id, manifest.digest)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[" * 100_000,
        b'{"manifest": 3}',
        b'{"manifest": {"name": "x"}}',
        b'{"manifest": {}, "signature": "00", "publisher": "00"}',
        b'{"manifest": {"name":"x","kind":"dataset","shards":'
        b'[{"shard_id":0,"filename":"../x","size":1,"content_id":"' + b"0" * 64 + b'","kind":"file"}]}}',
        b'{"manifest": {"name":"x","kind":"dataset","shards":'
        b'[{"shard_id":0,"filename":"manifest.json","size":1,"content_id":"' + b"0" * 64 + b'","kind":"file"}]}}',
    ],
)
def test_a_manifest_that_is_not_in_order_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(InvalidManifestError):
        read_manifest(tmp_path / "manifest.json", KEY)


def test_a_forged_manifest_is_refused_and_anothers_json_is_left_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.parquet")
    signed = sign_manifest(manifest_of(tmp_path, "x.parquet"), OTHER_KEY)
    forged = msgspec.structs.replace(signed, publisher=KEY.node_id)
    (tmp_path / "manifest.json").write_bytes(msgspec.json.encode(forged))
    with pytest.raises(InvalidManifestError, match="signature"):
        read_manifest(tmp_path / "manifest.json", KEY)
    (tmp_path / "manifest.json").write_bytes(b'{"name": "a web app"}')
    assert read_manifest(tmp_path / "manifest.json", KEY) is None


@pytest.mark.parametrize(
    "name", ["..", ".", "../../etc", "/etc", "owner/..", "a\0b", "\u202e", "x" * 200, "é" * 150, "-"]
)
def test_a_folder_name_is_one_plain_component(tmp_path: Path, name: str) -> None:
    for folder in folder_names(name, DIGEST):
        assert (tmp_path / folder).parent == tmp_path
        assert not folder.startswith(".")
        assert len(folder.encode()) <= 200
        (tmp_path / folder).mkdir(exist_ok=True)
        assert (tmp_path / folder).resolve().parent == tmp_path.resolve()


@pytest.mark.parametrize("name", ["..", "a/b", ".ssh", "manifest.json", "Manifest.JSON", "x.part", "x.gguf.invalid"])
def test_a_shard_that_would_hit_something_else_has_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidManifestError):
        shard_path(tmp_path, entry(name))


def test_a_loose_file_whose_name_peers_would_refuse_is_not_signed() -> None:
    with pytest.raises(InvalidManifestError):
        sign_loose(entry("back\\slash"), KEY)


def test_a_fetched_folder_is_found_again_and_never_anothers(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    write_shard(root / "x.parquet")
    signed = sign_manifest(manifest_of(root, "x.parquet", name="owner/set"), OTHER_KEY)
    held = prepare_folder(root, signed, ())
    folder = held.folder
    assert folder.name == f"owner--set@{signed.digest[:12]}"
    assert held.fetched
    assert not LocalManifest(root / "set", signed, held.fingerprint).fetched
    assert prepare_folder(root, signed, ()) == held
    assert prepare_folder(root, signed, {folder}).folder.name == f"owner--set@{signed.digest}"
    (folder / "manifest.json").write_bytes(b"{}")
    other = prepare_folder(root, signed, ()).folder
    assert other.name == f"owner--set@{signed.digest}"
    remove_if_empty(other)
    assert not other.exists()
    (folder / "keep").touch()
    remove_if_empty(folder)
    assert (folder / "manifest.json").exists()


def test_a_folder_that_leads_out_is_not_used(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_shard(root / "x.parquet")
    signed = sign_manifest(manifest_of(root, "x.parquet"), OTHER_KEY)
    (tmp_path / "out").mkdir()
    for name in folder_names("tiny", signed.digest):
        (root / name).symlink_to(tmp_path / "out")
    with pytest.raises(InvalidManifestError, match="no place"):
        prepare_folder(root.resolve(), signed, ())
    assert not list((tmp_path / "out").iterdir())


def test_what_is_in_the_way_is_set_aside_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    assert set_aside(path) is None
    path.write_bytes(b"old")
    aside = set_aside(path)
    assert aside is not None
    assert (path.exists(), aside.read_bytes()) == (False, b"old")
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "a.bin.part").symlink_to(victim)
    set_aside(path)
    assert not (tmp_path / "a.bin.part").is_symlink()
    link_or_copy(aside, path)
    assert path.read_bytes() == b"old"
    assert victim.read_bytes() == b"mine"
