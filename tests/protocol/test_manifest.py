import json
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import InvalidManifestError, ShardNotFoundError
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import (
    Manifest,
    ModelInfo,
    Shard,
    ShardEntry,
    ShardRef,
    SignedManifest,
    manifest_from_wire,
    safe_filename,
    sign_manifest,
)
from protocol.signing import SigningKey

KEY = SigningKey(bytes(range(32)))
MODEL = ModelInfo(architecture="llama", n_layers=4, n_embd=8, context_length=2048)


def entry(n: int, **changes: Any) -> ShardEntry:
    fields = {
        "shard_id": n,
        "filename": f"shard-{n}.gguf",
        "size": 1000 + n,
        "content_id": ContentId(f"{n:064x}"),
        "kind": "gguf",
        "start_layer": 2 * n,
        "end_layer": 2 * n + 2,
    }
    return ShardEntry(**{**fields, **changes})


def model(**changes: Any) -> Manifest:
    fields = {"name": "org/tiny", "kind": "model", "shards": (entry(0), entry(1)), "model": MODEL}
    return Manifest(**{**fields, **changes})


def wire(signed: SignedManifest) -> Any:
    return msgspec.to_builtins(signed)


def test_rows_that_are_not_set_are_no_part_of_the_digest() -> None:
    shard = ShardEntry(shard_id=0, filename="a.parquet", size=9, content_id=ContentId("ab" * 32), kind="parquet")
    bare = Manifest(name="set", kind="dataset", shards=(shard,))
    assert b"rows" not in bare.canonical_body()
    assert bare.digest == "bc9ee6e74c762f1d08191f580569c863137f68797f76141ea4d5a5e52ea913d3"
    counted = Manifest(name="set", kind="dataset", shards=(msgspec.structs.replace(shard, rows=0),))
    assert counted.digest != bare.digest
    assert manifest_from_wire(wire(sign_manifest(counted, KEY))).manifest == counted
    with pytest.raises(InvalidManifestError, match="rows"):
        sign_manifest(Manifest(name="set", kind="dataset", shards=(msgspec.structs.replace(shard, rows=-1),)), KEY)


def test_the_digest_is_of_the_canonical_body_and_never_changes() -> None:
    # Written down once: another digest means that manifests of before are no longer found.
    assert model().digest == "72153ea6d34201c273dd2b5f60d96b348f00286e20fa86a5715628ffed5454af"
    body = msgpack.unpackb(model().canonical_body())
    assert list(body) == sorted(body)
    assert [list(shard) for shard in body["shards"]] == [sorted(shard) for shard in body["shards"]]


def test_digest_follows_from_content_alone() -> None:
    first, second = sign_manifest(model(), KEY), sign_manifest(model(), SigningKey.generate())
    assert first.digest == second.digest
    assert first.signature != second.signature
    assert model(shards=(entry(0), entry(1, size=7))).digest != first.digest
    assert model(name="org/other").digest != first.digest


def test_a_signed_manifest_comes_back_by_messagepack_and_by_json() -> None:
    signed = sign_manifest(model(), KEY)
    assert manifest_from_wire(msgpack.unpackb(msgpack.packb(wire(signed))), signed.digest) == signed
    assert manifest_from_wire(json.loads(json.dumps(wire(signed)))) == signed


def test_another_digest_than_asked_for_is_refused() -> None:
    with pytest.raises(InvalidManifestError, match="asked for") as caught:
        manifest_from_wire(wire(sign_manifest(model(), KEY)), ManifestDigest("0" * 64))
    assert caught.value.details["expected"] == "0" * 64


CHANGES: list[Any] = [
    ("publisher", SigningKey(bytes(32)).node_id),
    ("publisher", "f" * 64),
    ("signature", "0" * 128),
    ("signature", "zz"),
    ("manifest", "name", "org/other"),
    ("manifest", "kind", "dataset"),
    ("manifest", "version", 2),
    ("manifest", "shards", 0, "size", 1),
    ("manifest", "shards", 0, "size", 0),
    ("manifest", "shards", 0, "content_id", "0" * 63),
    ("manifest", "shards", 0, "content_id", "F" * 64),
    ("manifest", "shards", 0, "filename", "other.gguf"),
    ("manifest", "shards", 0, "filename", b"other.gguf"),
    ("manifest", "model", "n_layers", 3),
    ("manifest", "model", None),
    ("manifest", "shards", []),
    ("manifest", 3),
]


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_refused(change: tuple[Any, ...]) -> None:
    value = wire(sign_manifest(model(), KEY))
    *path, last, new = change
    target = value
    for step in path:
        target = list(target) if isinstance(target, tuple) else target
        target = target[step]
    target[last] = new
    with pytest.raises(InvalidManifestError):
        manifest_from_wire(value)


BAD_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "a/b",
    "../a",
    "/etc/passwd",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\x7f",
    "é" * 101,
    "\ud800",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_could_lead_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(InvalidManifestError):
        safe_filename(name)
    with pytest.raises(InvalidManifestError):
        sign_manifest(model(shards=(entry(0, filename=name), entry(1))), KEY)


@pytest.mark.parametrize("name", ["..", "a/..", "../a", ".a/b", "a/", "a/b/c", "\ud800"])
def test_a_manifests_own_name_leads_nowhere_either(name: str) -> None:
    with pytest.raises(InvalidManifestError):
        sign_manifest(model(name=name), KEY)
    with pytest.raises(InvalidManifestError):
        manifest_from_wire(wire(SignedManifest(manifest=model(name=name), publisher=KEY.node_id, signature="0" * 128)))


@given(st.text(max_size=30))
def test_safe_names_are_one_component(name: str) -> None:
    try:
        safe = safe_filename(name)
    except InvalidManifestError:
        return
    assert safe == name
    assert not {"/", "\\", "\0"} & set(safe)
    assert safe not in ("", ".", "..")


@pytest.mark.parametrize(
    "manifest",
    [
        model(shards=(entry(1), entry(0))),
        model(shards=(entry(0), entry(0))),
        model(shards=(entry(0), entry(1, filename="shard-0.gguf"))),
        model(shards=(entry(0), entry(1, start_layer=3))),
        model(shards=(entry(0), entry(1, start_layer=1))),
        model(shards=(entry(0), entry(1, start_layer=None))),
        model(shards=(entry(0), entry(1, end_layer=None))),
        model(shards=(entry(0), entry(1, end_layer=2))),
        model(shards=(entry(0), entry(1, end_layer=5))),
        model(shards=(entry(0),)),
        model(model=None),
        Manifest(name="two", kind="file", shards=(entry(0), entry(1))),
        Manifest(name="large", kind="dataset", shards=tuple(entry(n, filename=f"{n:0200}") for n in range(18_000))),
    ],
)
def test_a_manifest_that_makes_no_sense_is_not_signed(manifest: Manifest) -> None:
    with pytest.raises(InvalidManifestError):
        sign_manifest(manifest, KEY)


def test_shard_by_number() -> None:
    assert model().shard(1).filename == "shard-1.gguf"
    for number in (-1, 2):
        with pytest.raises(ShardNotFoundError, match="0 to 1"):
            model().shard(number)
    assert model().total_bytes == 2001


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=5) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["manifest", "publisher", "signature", "shards", "name"]), inner, max_size=4)
    ),
    max_leaves=15,
)


@settings(max_examples=100)
@given(VALUES)
def test_any_value_is_refused_in_one_way(value: object) -> None:
    with pytest.raises(InvalidManifestError):
        manifest_from_wire(value)


def test_a_shard_is_named_by_its_manifest_and_number() -> None:
    signed = sign_manifest(model(), KEY)
    shard = signed.shard(1)
    assert shard == Shard(signed, signed.manifest.shards[1])
    assert shard.ref == ShardRef(signed.digest, 1) == ShardRef(shard.digest, shard.entry.shard_id)
    assert shard.label == "shard 1 of 'org/tiny' (shard-1.gguf)"
    again = sign_manifest(model(), KEY, ["o3://bucket/prefix"]).shard(1)
    assert again != shard  # signed with other origins
    assert again.ref == shard.ref
    with pytest.raises(ShardNotFoundError, match="0 to 1"):
        signed.shard(2)
