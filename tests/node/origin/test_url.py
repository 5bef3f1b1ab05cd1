"""Which URLs are origins, how they are spelled, and which keys there may be."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.origin.core.ranges import joined
from node.origin.factory import open_store
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl, checked_key
from protocol.errors import InvalidParamsError


@pytest.mark.parametrize(
    ("text", "place", "prefix"),
    [
        ("o3://bucket", "bucket", ""),
        ("o3://bucket/", "bucket", ""),
        ("akave://my-bucket.1/a/b/", "my-bucket.1", "a/b"),
        ("s3://bucket/a%20b", "bucket", "a b"),
        ("https://example.org:8443/models", "example.org:8443", "models"),
        ("https://Example.ORG", "example.org", ""),
        ("http://127.0.0.1:9000/x", "127.0.0.1:9000", "x"),
        ("http://[::1]:9000", "[::1]:9000", ""),
        ("http://localhost/x", "localhost", "x"),
        ("file:///data/with%20space/", "/data/with space", ""),
        ("file://localhost/data", "/data", ""),
        ("hf://owner/name", "owner/name", ""),
        ("hf://owner/name/sub/folder", "owner/name", "sub/folder"),
        ("  o3://bucket/x\n", "bucket", "x"),
    ],
)
def test_a_url_is_read(text: str, place: str, prefix: str) -> None:
    url = OriginUrl.parse(text)
    assert (url.container, url.prefix) == (place, prefix)
    assert OriginUrl.parse(str(url)) == url


def test_a_url_of_the_hub_has_a_kind_and_a_revision() -> None:
    url = OriginUrl.parse("hf://datasets/owner/name@refs%2Fpr%2F1/train")
    assert (url.repo_type, url.container, url.revision, url.prefix) == ("dataset", "owner/name", "refs/pr/1", "train")
    assert str(url) == "hf://datasets/owner/name@refs%2Fpr%2F1/train"
    assert OriginUrl.parse("hf://models/owner/name") == OriginUrl.parse("hf://owner/name")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "bucket/prefix",
        "gs://bucket",
        "o3:///prefix",
        "s3://b",
        "s3://bucket/../other",
        "s3://bucket/a//b",
        "s3://bucket/a%2F..%2Fb",
        "https:///path",
        "http://example.org/x",
        "http://10.0.0.1/x",
        "http://127.0.0.1.example.org/x",
        "https://example.org:notaport/",
        "hf://owner",
        "hf://owner/",
        "hf://datasets/owner",
        "file://host/path",
        "file:relative",
        "file:///",
    ],
)
def test_what_is_no_origin_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        OriginUrl.parse(text)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@example.org/x",
        "s3://hunter2:key@bucket/x",
        "hf://hunter2@owner/name",
        "https://example.org/x?X-Amz-Signature=hunter2",
        "s3://bucket/x#hunter2",
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        OriginUrl.parse(text)
    assert "hunter2" not in caught.value.message


@given(st.text(max_size=40))
def test_no_key_leads_out(key: str) -> None:
    url = OriginUrl("file", "/root")
    try:
        full = url.full_key(key)
    except InvalidParamsError:
        return
    assert full == key
    assert not full.startswith("/")
    assert not {"", ".", ".."} & set(full.split("/"))


def test_a_prefix_counts_for_the_length_of_a_key() -> None:
    url = OriginUrl.parse("s3://bucket/" + "p" * 1000)
    assert url.full_key("k" * 23)
    with pytest.raises(InvalidParamsError, match="1024"):
        url.full_key("k" * 24)
    assert checked_key("a/b..c/.hidden/…") == "a/b..c/.hidden/…"


@pytest.mark.parametrize("scheme", ["o3", "s3", "https", "hf", "file"])
def test_opening_reaches_nothing(scheme: str) -> None:
    url = {"file": "file:///nowhere/at/all", "hf": "hf://owner/name"}.get(scheme, f"{scheme}://nowhere.invalid/x")
    assert open_store(url, OriginSettings()).url == url


@given(st.lists(st.tuples(st.integers(0, 1 << 27), st.integers(0, 1 << 22)).map(lambda one: (one[0], sum(one)))))
def test_joined_ranges_cover_each_range_once(ranges: list[tuple[int, int]]) -> None:
    spans = joined(ranges)
    assert all(start < end for start, end in spans)
    assert spans == sorted(spans)
    for start, end in ranges:
        assert start == end or any(first <= start and end <= stop for first, stop in spans)


def test_ranges_are_joined_where_they_are_close() -> None:
    mib = 1 << 20
    assert joined([(0, 10), (5, 20), (mib, 2 * mib)]) == [(0, 2 * mib)]
    assert joined([(0, 10), (mib + 11, mib + 12)]) == [(0, 10), (mib + 11, mib + 12)]
    assert joined([(0, 31 * mib), (31 * mib, 63 * mib)]) == [(0, 31 * mib), (31 * mib, 63 * mib)]


async def test_a_key_file_turns_encryption_on(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0123456789abcdef" * 4 + "\n")
    url = (tmp_path / "origin").as_uri()
    store = open_store(url, OriginSettings(encryption_key_file=tmp_path / "key"))
    await store.put("a", b"plain text" * 20)
    assert await store.get_range("a", 6, 14) == b"textplai"
    assert b"plain" not in (tmp_path / "origin" / "a").read_bytes()
    (tmp_path / "key").write_text("too short")
    for name in ("key", "missing"):
        with pytest.raises(InvalidParamsError, match=name):
            open_store(url, OriginSettings(encryption_key_file=tmp_path / name))
