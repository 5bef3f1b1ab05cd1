"""What was hashed before: (path, size, mtime) -> content id, piece layer and rows, in an sqlite file.

It is a cache. A damaged one is set aside and a new one made, a row that contradicts itself is not believed, and if it
cannot be written the price is a second hashing.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from node.files import Fingerprint, replace_file
from protocol.content import ContentHash, is_piece_layer
from protocol.ids import ContentId

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2
_CREATE = """
CREATE TABLE IF NOT EXISTS hashed (
    path BLOB PRIMARY KEY,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    content_id BLOB NOT NULL,
    piece_layer BLOB NOT NULL,
    rows INTEGER
) WITHOUT ROWID
"""
T = TypeVar("T")


class HashCache:
    """Blocks on the disk, so it is called off the event loop; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._db = self._connect()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def get(self, path: Path, fingerprint: Fingerprint) -> ContentHash | None:
        """What this file's bytes hashed to, if they were hashed with this size and time."""

        def read(db: sqlite3.Connection) -> tuple[int, bytes, bytes] | None:
            row: tuple[int, bytes, bytes] | None = db.execute(
                "SELECT size, content_id, piece_layer FROM hashed WHERE path = ? AND size = ? AND mtime_ns = ?",
                (os.fsencode(path), fingerprint.size, fingerprint.mtime_ns),
            ).fetchone()
            return row

        row = self._run(read, None)
        return _believed(*row) if row else None

    def rows(self, path: Path, fingerprint: Fingerprint) -> int | None:
        """The rows of a parquet file, if they were counted when it was hashed with this size and time."""

        def read(db: sqlite3.Connection) -> int | None:
            row: tuple[int | None] | None = db.execute(
                "SELECT rows FROM hashed WHERE path = ? AND size = ? AND mtime_ns = ?",
                (os.fsencode(path), fingerprint.size, fingerprint.mtime_ns),
            ).fetchone()
            return row[0] if row else None

        return self._run(read, None)

    def put(self, path: Path, fingerprint: Fingerprint, content: ContentHash, rows: int | None = None) -> None:
        """Keep it; `rows` of a parquet file, if they were counted."""

        def write(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT OR REPLACE INTO hashed VALUES (?, ?, ?, ?, ?, ?)",
                (
                    os.fsencode(path),
                    fingerprint.size,
                    fingerprint.mtime_ns,
                    bytes.fromhex(content.content_id),
                    content.piece_layer,
                    rows,
                ),
            )

        self._run(write, None)

    def forget(self, path: Path) -> None:
        self._run(lambda db: _ignore(db.execute("DELETE FROM hashed WHERE path = ?", (os.fsencode(path),))), None)

    def keep_only(self, root: Path, paths: Collection[Path], slack: int = 10_000) -> None:
        """Forget what lies under `root` and is not among `paths`, once that is more than `slack` files.

        Not earlier: a disk that is not mounted for a while should not cost a hashing of all that is on it.
        """
        prefix = os.path.join(os.fsencode(root), b"")
        known = {os.fsencode(path) for path in paths}

        def prune(db: sqlite3.Connection) -> None:
            stale = [
                (path,)
                for (path,) in db.execute("SELECT path FROM hashed")
                if path.startswith(prefix) and path not in known
            ]
            if len(stale) > slack:
                db.executemany("DELETE FROM hashed WHERE path = ?", stale)

        self._run(prune, None)

    def _run(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Do `work` in a transaction. On damage a new file is made, and `otherwise` returned."""
        with self._lock:
            try:
                with self._db:
                    return work(self._db)
            except sqlite3.OperationalError as err:
                log.warning("cannot use the hash cache %s: %s; files may be hashed again", self._path, err)
            except sqlite3.DatabaseError as err:
                self._db.close()
                self._set_aside(err)
                self._db = self._connect()
        return otherwise

    def _connect(self) -> sqlite3.Connection:
        try:
            return _open(self._path)
        except sqlite3.DatabaseError as err:
            self._set_aside(err)
            return _open(self._path)

    def _set_aside(self, err: sqlite3.DatabaseError) -> None:
        damaged = self._path.with_name(self._path.name + ".damaged")
        log.warning(
            "the hash cache %s is damaged (%s): set aside as %s, files are hashed again", self._path, err, damaged
        )
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        if self._path.exists():
            replace_file(self._path, damaged)


def _open(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=5, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, 1, SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"it has layout {version}, this node writes {SCHEMA_VERSION}")
        problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        with db:
            db.execute(_CREATE)
            if version == 1:
                db.execute("ALTER TABLE hashed ADD COLUMN rows INTEGER")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    except BaseException:
        db.close()
        raise
    return db


def _believed(size: int, content_id: bytes, piece_layer: bytes) -> ContentHash | None:
    """The row, if its piece layer leads to its content id (BEP 52): a wrong one would seed what no peer can check."""
    if len(content_id) != 32 or not is_piece_layer(piece_layer, size, content_id.hex()):
        return None
    return ContentHash(size, ContentId(content_id.hex()), piece_layer)


def _ignore(_: object) -> None:
    return None
