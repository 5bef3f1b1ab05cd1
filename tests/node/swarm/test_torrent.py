"""What follows from a shard alone, against libtorrent's own making of it."""

import random
from pathlib import Path

import libtorrent as lt
import pytest

from node.swarm import Torrent
from protocol.content import hash_file, piece_length
from protocol.errors import InvalidShardError
from protocol.ids import ContentId

KIB = 1024
MIB = 1024 * KIB


@pytest.mark.parametrize("size", [1, 16 * KIB, 256 * KIB, 256 * KIB + 1, 3 * MIB + 17, 5 * MIB])
def test_two_nodes_and_libtorrent_make_the_same_torrent(tmp_path: Path, size: int):
    path = tmp_path / "Größe 1.gguf"
    path.write_bytes(random.Random(size).randbytes(size))
    hashed = hash_file(path)
    torrent = Torrent.of(path.name, size, hashed.content_id)

    created = lt.create_torrent(lt.list_files(str(path)), torrent.piece_length, lt.create_torrent_flags_t.v2_only)
    lt.set_piece_hashes(created, str(tmp_path))
    theirs = lt.bdecode(lt.bencode(created.generate()))
    assert lt.bdecode(torrent.info_dict()) == {
        key: theirs[b"info"][key] for key in (b"file tree", b"meta version", b"name", b"piece length")
    }
    assert next(iter(theirs.get(b"piece layers", {}).values()), b"") == hashed.piece_layer

    params = lt.load_torrent_buffer(torrent.metainfo(hashed.piece_layer))
    assert str(params.ti.info_hashes().v2) == torrent.info_hash
    assert params.ti.num_pieces() == torrent.pieces
    assert torrent == Torrent.of(path.name, size, hashed.content_id)
    assert torrent.info_hash != Torrent.of("other", size, hashed.content_id).info_hash
    assert torrent.has_layer(hashed.piece_layer)
    assert torrent.has_layer(b"") == (torrent.pieces == 1)
    assert not torrent.has_layer(bytes(len(hashed.piece_layer) or 32))


def test_pieces_cover_the_file():
    torrent = Torrent.of("x", 3 * MIB + 17, ContentId("ab" * 32))
    pieces = [torrent.piece(index) for index in range(torrent.pieces)]
    assert sum(piece.size for piece in pieces) == torrent.size
    assert [piece.offset for piece in pieces] == [index * torrent.piece_length for index in range(torrent.pieces)]
    with pytest.raises(IndexError):
        torrent.piece(torrent.pieces)


@pytest.mark.parametrize("pieces", [513, 1025, 1537, 2049, 5121])
@pytest.mark.parametrize("over", [1, 100_000])
def test_no_last_run_of_hashes_is_a_single_one(pieces: int, over: int):
    for unit in (256 * KIB, 512 * KIB, MIB, 4 * MIB):
        size = (pieces - 1) * unit + over
        count = -(-size // piece_length(size))
        assert count <= 512 or count % 512 != 1


def test_an_empty_file_has_no_torrent():
    with pytest.raises(InvalidShardError, match="empty"):
        Torrent.of("x", 0, ContentId("ab" * 32))
