"""Files inside archives at an origin, member by member; the archive itself is never on the disk.

A plain tar is read for its headers once, a zip for its directory; their members come by ranges, in any order. A
compressed tar (gz, bz2, xz, zst) has neither: it is read through once to know what is in it, and then from its begin
while members are asked for, in their order.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from node.files import replace_file
from protocol.errors import InvalidShardError, OriginNotFoundError
from torch_bridge.batches.folder import read_json, write_json
from torch_bridge.batches.plan import RemoteFile
from torch_bridge.batches.sources.archive_members import (
    BoundedTarInfo,
    Kind,
    MemberStream,
    copy,
    is_file,
    is_zipped_file,
    kind_of,
    translated,
)
from torch_bridge.batches.sources.origin import OriginFiles
from torch_bridge.batches.sources.range_file import SMALL_BLOCK_BYTES, OnBytes, RangeFile, StreamedFile
from torch_bridge.core.store import Store

INSIDE = "!/"
"""Between an archive's key and a member's name, in the key of the member."""


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """What an archive may claim. More is a bomb, or no data set."""

    members: int = 1_000_000
    unpacked_bytes: int = 1 << 40
    """Of all members of an archive together."""


class ArchiveFiles:
    """The regular files in one or several archives of a store."""

    def __init__(
        self,
        store: Store,
        archives: Sequence[str],
        *,
        suffixes: tuple[str, ...] = (),
        limits: ArchiveLimits | None = None,
        skip_others: bool = False,
    ) -> None:
        """`archives`: keys of the store, which end in .tar, .zip, .tar.gz, .tgz, .tar.bz2, .tar.xz or .tar.zst. One
        with links, devices or sparse files is refused, or with `skip_others` they are passed over.

        Raises InvalidParamsError for others.
        """
        self._store = store
        self._kinds = {key: kind_of(key) for key in archives}
        self._suffixes = suffixes
        self._limits = limits or ArchiveLimits()
        self._skip_others = skip_others
        self._reading: MemberStream | None = None
        self._zips: dict[tuple[int, str], zipfile.ZipFile] = {}
        self._opening = threading.Lock()

    @property
    def name(self) -> str:
        return f"{self._store.url} ({', '.join(self._kinds)})"

    @property
    def in_order(self) -> bool:
        """See FileSource: as soon as one of them is a compressed tar."""
        return any(kind.startswith("tar.") for kind in self._kinds.values())

    def list(self, notes: Path) -> Sequence[RemoteFile]:
        """See FileSource. Raises InvalidShardError for what is not such archive, passes the limits, or has members that
        would lead out of a folder: nothing of it is brought then.
        """
        found: list[RemoteFile] = []
        for key, kind in self._kinds.items():
            info = self._store.head(key)
            version = RemoteFile(key, info.size, (info.etag or str(info.modified_s or "")).strip('"'))
            note = notes / f"archive-{version.identity}.json"
            rows = read_json(note)
            if rows is None:
                rows = [list(row) for row in self._members(key, kind, info.size)]
                write_json(note, rows)
            # The validator holds the offset of a plain tar's member, beside the archive's version.
            for name, size, mark in rows:
                if size > 0 and (not self._suffixes or name.endswith(self._suffixes)):
                    found.append(RemoteFile(f"{key}{INSIDE}{name}", size, f"{mark}@{version.identity}"))
        return found

    def fetch(self, file: RemoteFile, target: Path, *, stop: threading.Event, on_bytes: OnBytes) -> Path:
        """See FileSource. A member that was broken off begins again."""
        key, name = self._split(file.key)
        part = target.with_name(target.name + ".part")
        mark = file.validator.partition("@")[0]
        with part.open("wb") as out:
            if self._kinds[key] == "tar":
                self._by_range(key, int(mark), file, out, stop, on_bytes)
            elif self._kinds[key] == "zip":
                with translated(f"{self._store.url}: {key!r}"), self._zip(key).open(name) as member:
                    copy(member, out, file, stop, on_bytes)
            else:
                self._next_to(key, int(mark), file, out, stop, on_bytes)
        return replace_file(part, target)

    def release(self, file: RemoteFile) -> None:
        """See FileSource."""

    def read(self, key: str) -> bytes:
        """See FileSource; a key without an archive's name is beside the archives."""
        return OriginFiles(self._store).read(key)

    def _split(self, key: str) -> tuple[str, str]:
        archive, _, name = key.partition(INSIDE)
        if archive not in self._kinds:
            raise OriginNotFoundError(f"{self.name}: {key!r} is in none of these archives", {"key": key})
        return archive, name

    def _members(self, key: str, kind: Kind, size: int) -> Iterator[tuple[str, int, str]]:
        """Name, bytes and mark of each: where its bytes begin (tar), its CRC (zip), its number (compressed tar)."""
        total = 0
        for number, (name, unpacked, mark) in enumerate(self._look(key, kind, size)):
            total += unpacked
            if number >= self._limits.members or total > self._limits.unpacked_bytes:
                raise InvalidShardError(
                    f"{self._store.url}: {key!r} claims {number + 1} members or more, of {total} bytes; the limits are "
                    f"{self._limits}: if that is meant, give higher ones"
                )
            yield name, unpacked, mark

    def _look(self, key: str, kind: Kind, size: int) -> Iterator[tuple[str, int, str]]:
        what = f"{self._store.url}: {key!r}"
        with translated(what):
            if kind == "zip":
                for one in {one.filename: one for one in self._zip(key).infolist()}.values():
                    if is_zipped_file(one, what, skip_others=self._skip_others):
                        yield one.filename, one.file_size, f"{one.CRC:08x}"
            elif kind == "tar":
                raw = RangeFile(self._store, key, size, SMALL_BLOCK_BYTES)
                with tarfile.open(
                    fileobj=cast(IO[bytes], io.BufferedReader(raw, 512)),
                    mode="r:",
                    tarinfo=BoundedTarInfo,
                    errors="replace",
                ) as tar:
                    for member in tar:
                        if is_file(member, what, skip_others=self._skip_others):
                            yield member.name, member.size, str(member.offset_data)
                        tar.members = []  # type: ignore[attr-defined]
            else:
                with self._stream(key) as reading:
                    for number, member in reading:
                        yield member.name, member.size, str(number)

    def _zip(self, key: str) -> zipfile.ZipFile:
        """One for all threads of a process: its directory is read once, and its reads take turns."""
        with self._opening:
            where = os.getpid(), key
            if where not in self._zips:
                raw = RangeFile(self._store, key, self._store.head(key).size)
                self._zips[where] = zipfile.ZipFile(cast(IO[bytes], raw))
            return self._zips[where]

    def _by_range(
        self, key: str, at: int, file: RemoteFile, out: IO[bytes], stop: threading.Event, on_bytes: OnBytes
    ) -> None:
        chunks = self._store.stream(key, at, at + file.size)
        with closing(StreamedFile(chunks, f"{self._store.url}: {key!r}")) as raw:
            copy(cast(IO[bytes], raw), out, file, stop, on_bytes)

    def _next_to(
        self, key: str, number: int, file: RemoteFile, out: IO[bytes], stop: threading.Event, on_bytes: OnBytes
    ) -> None:
        """Read on to member `number` from where the last fetch stopped, or from the beginning if it is before that."""
        reading = self._reading
        if reading is None or reading.key != key or reading.at > number or reading.process != os.getpid():
            self._close()
            reading = self._reading = self._stream(key)
        reading.until(stop)
        try:
            with translated(f"{self._store.url}: {key!r}"):
                for at, member in reading:
                    if at == number:
                        copy(reading.open(member), out, file, stop, on_bytes)
                        return
        except BaseException:
            self._close()
            raise
        self._close()
        raise OriginNotFoundError(f"{self._store.url}: {key!r} has no member {number} any more", {"key": file.key})

    def _stream(self, key: str) -> MemberStream:
        return MemberStream(self._store, key, self._kinds[key], skip_others=self._skip_others)

    def _close(self) -> None:
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.close()

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name != "_opening"}
        return kept | {"_reading": None, "_zips": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _opening=threading.Lock())
