import hashlib
import os
from pathlib import Path

import libtorrent as lt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.content import (
    HASH_RUN,
    LEAF_BYTES,
    MAX_PIECE_BYTES,
    MIN_PIECE_BYTES,
    ContentHasher,
    hash_file,
    merkle_root,
    piece_length,
)

KIB = 1024


def spec_root(data: bytes) -> bytes:
    """BEP 52 word for word: 16 KiB leaves, padded with zero hashes to a power of two."""
    row = [hashlib.sha256(data[at : at + LEAF_BYTES]).digest() for at in range(0, len(data), LEAF_BYTES)]
    while len(row) & (len(row) - 1):
        row.append(bytes(32))
    while len(row) > 1:
        row = [hashlib.sha256(row[i] + row[i + 1]).digest() for i in range(0, len(row), 2)]
    return row[0]


def some_bytes(size: int) -> bytes:
    return hashlib.shake_128(size.to_bytes(8)).digest(size)


SIZES = [
    1,
    LEAF_BYTES - 1,
    LEAF_BYTES,
    LEAF_BYTES + 1,
    3 * LEAF_BYTES,
    MIN_PIECE_BYTES - 1,
    MIN_PIECE_BYTES,
    MIN_PIECE_BYTES + 1,
    2 * MIN_PIECE_BYTES,
    3 * MIN_PIECE_BYTES + 5,
    1024 * KIB,
    5 * 1024 * KIB + 77,
]


@pytest.mark.parametrize("size", SIZES)
def test_the_content_id_is_the_root_of_bep_52(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    data = some_bytes(size)
    path.write_bytes(data)
    found = hash_file(path)
    assert found.size == size
    assert found.content_id == spec_root(data).hex()
    pieces = -(-size // piece_length(size))
    assert len(found.piece_layer) == (32 * pieces if pieces > 1 else 0)


@pytest.mark.parametrize("size", SIZES)
def test_libtorrent_finds_the_same(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(some_bytes(size))
    torrent = lt.create_torrent(lt.list_files(str(path)), piece_length(size), lt.create_torrent.v2_only)
    lt.set_piece_hashes(torrent, str(tmp_path))
    entry = torrent.generate()
    found = hash_file(path)
    root = entry[b"info"][b"file tree"][b"file"][b""][b"pieces root"]
    assert found.content_id == root.hex()
    assert found.piece_layer == entry.get(b"piece layers", {}).get(root, b"")


def test_progress_ends_at_the_size_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(some_bytes(3 * 1024 * KIB + 1))
    seen: list[int] = []
    hash_file(path, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 3 * 1024 * KIB + 1
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        hash_file(path)


def test_what_is_appended_meanwhile_is_left_out_and_what_is_cut_off_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = some_bytes(3 * 1024 * KIB)
    path.write_bytes(data)

    def append(done: int) -> None:
        with path.open("ab") as file:
            file.write(b"more")

    assert hash_file(path, append).content_id == spec_root(data).hex()
    path.write_bytes(data)
    with pytest.raises(OSError, match="shortened"):
        hash_file(path, lambda done: os.truncate(path, 1024))


SOME_SIZES = st.integers(1, 1 << 42) | st.builds(
    lambda pieces, power, more: (pieces << power) + more,
    st.integers(1, 20_000),
    st.integers(18, 23),
    st.integers(-2, 2),
)


@given(SOME_SIZES.filter(lambda size: size > 0))
def test_piece_length_is_a_power_of_two_that_keeps_pieces_few(size: int) -> None:
    length = piece_length(size)
    pieces = -(-size // length)
    assert length & (length - 1) == 0
    assert length >= MIN_PIECE_BYTES
    assert length >= MAX_PIECE_BYTES or pieces <= 1024
    assert pieces <= HASH_RUN or pieces % HASH_RUN != 1
    if length > MIN_PIECE_BYTES and (length > MAX_PIECE_BYTES or 2 * pieces <= 1024):
        # Longer than the size asks for: then only since half of it would leave a lone hash.
        assert -(-size // (length // 2)) % HASH_RUN == 1


@pytest.mark.parametrize(
    ("size", "length"),
    [
        (1, 256 * KIB),
        (256 << 20, 256 * KIB),
        ((256 << 20) + 1, 1 << 20),
        ((256 << 20) + (600 << 10), 512 * KIB),
        (1 << 30, 1 << 20),
        (4 << 30, 4 << 20),
        ((32 << 30) - 1, 4 << 20),
    ],
)
def test_piece_lengths_never_change(size: int, length: int) -> None:
    assert piece_length(size) == length


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=40))
def test_merkle_root_pads_with_the_right_pad(hashes: list[bytes]) -> None:
    padded = hashes + [bytes(32)] * ((1 << (len(hashes) - 1).bit_length()) - len(hashes))
    assert merkle_root(hashes) == merkle_root(padded)
    if len(padded) > 1:
        half = len(padded) // 2
        left, right = merkle_root(padded[:half]), merkle_root(padded[half:])
        assert merkle_root(hashes) == hashlib.sha256(left + right).digest()


@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=8))
def test_it_follows_however_the_bytes_come(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    chunks = [bytes([number + 1]) * length for number, length in enumerate([*lengths, 1])]
    path = tmp_path_factory.mktemp("chunks") / "whole"
    path.write_bytes(b"".join(chunks))
    hasher = ContentHasher(path.stat().st_size)
    for chunk in chunks:
        with pytest.raises(ValueError, match="were hashed"):
            hasher.result()
        hasher.update(chunk)
    assert hasher.result() == hash_file(path)
