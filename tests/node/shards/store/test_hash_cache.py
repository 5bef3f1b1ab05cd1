"""What was hashed before: remembered, never believed against the evidence, rebuilt when damaged."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from node.files import Fingerprint
from node.shards.store.hash_cache import HashCache
from protocol.content import ContentHash, hash_file

PRINT = Fingerprint(1_000_000, 17)


def content(tmp_path: Path, size: int = 1_000_000) -> ContentHash:
    path = tmp_path / "hashed.bin"
    path.write_bytes(os.urandom(size))
    return hash_file(path)


def test_a_hash_is_found_for_the_same_path_size_and_time_alone(tmp_path: Path) -> None:
    index = HashCache(tmp_path / "index.sqlite")
    path, hashed = tmp_path / os.fsdecode(b"not-utf8-\xff"), content(tmp_path)
    assert hashed.piece_layer
    index.put(path, PRINT, hashed)
    index.close()
    index = HashCache(tmp_path / "index.sqlite")
    assert index.get(path, PRINT) == hashed
    assert index.get(path, Fingerprint(PRINT.size, 18)) is None
    assert index.get(path, Fingerprint(PRINT.size + 1, 17)) is None
    assert index.get(tmp_path / "other", PRINT) is None
    index.forget(path)
    assert index.get(path, PRINT) is None
    index.close()


def test_only_what_is_gone_from_the_folder_is_pruned(tmp_path: Path) -> None:
    index = HashCache(tmp_path / "index.sqlite")
    hashed = content(tmp_path)
    kept, gone, elsewhere = tmp_path / "in/a", tmp_path / "in/b", tmp_path / "in-between/c"
    for path in (kept, gone, elsewhere):
        index.put(path, PRINT, hashed)
    index.keep_only(tmp_path / "in", {kept}, slack=1)
    assert index.get(gone, PRINT) == hashed
    index.keep_only(tmp_path / "in", {kept}, slack=0)
    assert [index.get(path, PRINT) is not None for path in (kept, gone, elsewhere)] == [True, False, True]
    index.close()


def test_a_row_that_contradicts_itself_is_not_believed(tmp_path: Path) -> None:
    index = HashCache(tmp_path / "index.sqlite")
    hashed = content(tmp_path)
    layer = bytes([hashed.piece_layer[0] ^ 1]) + hashed.piece_layer[1:]
    for path, wrong in {
        "layer": hashed._replace(piece_layer=layer),
        "short": hashed._replace(piece_layer=hashed.piece_layer[:-32]),
        "none": hashed._replace(piece_layer=b""),
        "id": hashed._replace(content_id="00" * 31),
    }.items():
        index.put(Path(path), PRINT, wrong)
        assert index.get(Path(path), PRINT) is None, path
    index.close()


def test_a_damaged_index_is_set_aside_and_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "index.sqlite"
    hashed = content(tmp_path)
    for damage in (b"this is no database, whatever its name says" * 100, b"SQLite format 3\0" + os.urandom(8000)):
        file.write_bytes(damage)
        index = HashCache(file)
        assert index.get(Path("a"), PRINT) is None
        index.put(Path("a"), PRINT, hashed)
        assert index.get(Path("a"), PRINT) == hashed
        index.close()
        assert file.with_name("index.sqlite.damaged").read_bytes() == damage


def test_damage_that_comes_while_it_is_open_costs_a_rehash_and_no_more(tmp_path: Path) -> None:
    file = tmp_path / "index.sqlite"
    hashed = content(tmp_path)
    index = HashCache(file)
    for number in range(200):
        index.put(Path(str(number)), PRINT, hashed)
    index.close()
    size = file.stat().st_size
    index = HashCache(file)
    with file.open("r+b") as raw:
        raw.seek(4096)
        raw.write(os.urandom(size - 4096))
    for number in range(200):
        assert index.get(Path(str(number)), PRINT) in (None, hashed)
    index.put(Path("new"), PRINT, hashed)
    assert index.get(Path("new"), PRINT) == hashed
    index.close()


def test_an_index_without_rows_is_taken_over(tmp_path: Path) -> None:
    file, hashed = tmp_path / "index.sqlite", content(tmp_path)
    with sqlite3.connect(file) as db:
        db.execute(
            "CREATE TABLE hashed (path BLOB PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, "
            "content_id BLOB NOT NULL, piece_layer BLOB NOT NULL) WITHOUT ROWID"
        )
        row = (b"a", PRINT.size, PRINT.mtime_ns, bytes.fromhex(hashed.content_id), hashed.piece_layer)
        db.execute("INSERT INTO hashed VALUES (?, ?, ?, ?, ?)", row)
        db.execute("PRAGMA user_version = 1")
    db.close()
    for _ in range(2):
        index = HashCache(file)
        assert index.get(Path("a"), PRINT) == hashed
        index.put(Path("b"), PRINT, hashed, rows=7)
        assert [index.rows(Path(name), PRINT) for name in "abc"] == [None, 7, None]
        assert index.rows(Path("b"), Fingerprint(PRINT.size, 18)) is None
        index.close()
    assert not file.with_name("index.sqlite.damaged").exists()


def test_an_index_of_another_layout_is_not_misread(tmp_path: Path) -> None:
    file = tmp_path / "index.sqlite"
    with sqlite3.connect(file) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    index = HashCache(file)
    index.put(Path("a"), PRINT, hashed := content(tmp_path))
    assert index.get(Path("a"), PRINT) == hashed
    index.close()
