"""file://: a folder as an origin: a disk that is carried from one machine to another, a network share, a test."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO, TypeVar

from node.files import fsync_dir, fsync_file, replace_file
from node.origin.core.errors import corrupt_error, listing_too_long_error, origin_error
from node.origin.core.listing import readable_objects
from node.origin.interface import MAX_LISTED, ObjectInfo, OnBytes
from node.origin.url import OriginUrl, checked_key
from protocol.errors import OriginDeniedError, OriginError, OriginExistsError, OriginNotFoundError

T = TypeVar("T")

CHUNK_BYTES = 1 << 20
_UNFINISHED = ".shoal-unfinished-"
"""The prefix of a file that is being written; listings leave it out."""


class FileStore:
    """Objects are files under one folder. User metadata is not kept. Nothing needs to be closed."""

    min_object_bytes = 0
    writes_once = False
    range_unit_bytes = 1

    def __init__(self, url: OriginUrl) -> None:
        self.url = str(url)
        self._origin_url = url
        self._root = Path(url.container)

    async def head(self, key: str) -> ObjectInfo:
        """See ObjectStore."""
        return await self._off_loop("read", key, lambda: _info(key, os.stat(self._path(key))))

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        """See ObjectStore."""
        return (await self.get_ranges(key, [(start, end)]))[0]

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See ObjectStore."""

        def read() -> list[bytes]:
            with self._path(key).open("rb") as file:
                return [self._exactly(file, key, start, end) for start, end in ranges]

        return await self._off_loop("read", key, read)

    async def get_stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See ObjectStore; in pieces of a mebibyte."""
        file = await self._off_loop("read", key, lambda: self._path(key).open("rb"))
        try:
            size = os.fstat(file.fileno()).st_size
            stop = size if end is None else end
            if stop > size or start > stop:
                raise self._short(key, start, stop, size)
            while start < stop:
                upto = min(start + CHUNK_BYTES, stop)
                yield await self._off_loop("read", key, self._exactly, file, key, start, upto)
                start = upto
        finally:
            file.close()

    async def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        """See ObjectStore. When it returns, a power cut does not lose the object: a manifest follows its shards."""
        path = self._path(key)
        unfinished = path.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}")
        if if_absent and await self._off_loop("look for", key, path.exists):
            raise self._exists(key)
        await self._off_loop("write", key, _make_folder, path.parent)
        target = await self._off_loop("write", key, unfinished.open, "xb")
        try:
            chunks = await self._off_loop("read", str(body) if isinstance(body, Path) else key, lambda: _chunks(body))
            while chunk := await self._off_loop("write", key, _copy_one, chunks, target):
                if on_bytes is not None:
                    on_bytes(chunk)
            return await self._off_loop("write", key, self._finish, key, target, unfinished, path, if_absent)
        finally:
            target.close()
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See ObjectStore."""

        def walk() -> list[ObjectInfo]:
            found, seen = [], 0
            start = self._root / checked_key(folder) if (folder := prefix.rpartition("/")[0]) else self._root
            for parent, _, names in os.walk(start):
                seen += len(names)
                if seen > MAX_LISTED:
                    raise listing_too_long_error(prefix, origin=self.url)
                for name in names:
                    key = (Path(parent) / name).relative_to(self._root).as_posix()
                    if key.startswith(prefix) and not name.startswith(_UNFINISHED):
                        with suppress(OSError):  # deleted in the meantime, or a broken link
                            found.append(_info(key, os.stat(self._root / key)))
            return readable_objects(found, self._origin_url, prefix)

        for info in await self._off_loop("list", prefix, walk):
            yield info

    async def delete(self, key: str) -> None:
        """See ObjectStore."""
        with suppress(OriginNotFoundError):
            await self._off_loop("delete", key, lambda: self._path(key).unlink())

    async def close(self) -> None:
        """See ObjectStore."""

    def _path(self, key: str) -> Path:
        path = self._root / checked_key(key)
        # A link inside the folder may lead out of it.
        if not path.resolve().is_relative_to(self._root.resolve()):
            advice = "put the file itself there"
            raise origin_error(
                OriginDeniedError, "open", "it is a link that leads out of the folder", advice, origin=self.url, key=key
            )
        return path

    def _exactly(self, file: BinaryIO, key: str, start: int, end: int) -> bytes:
        size = os.fstat(file.fileno()).st_size
        if not 0 <= start <= end <= size:
            raise self._short(key, start, end, size)
        data = os.pread(file.fileno(), end - start, start)
        while len(data) < end - start:
            more = os.pread(file.fileno(), end - start - len(data), start + len(data))
            if not more:
                raise self._short(key, start, end, start + len(data))
            data += more
        return data

    def _finish(self, key: str, target: BinaryIO, unfinished: Path, path: Path, if_absent: bool) -> ObjectInfo:
        target.flush()
        if if_absent:
            fsync_file(unfinished)
            try:
                os.link(unfinished, path)  # fails if the name is taken, and so decides between two writers
            except FileExistsError:
                raise self._exists(key) from None
            fsync_dir(path.parent)
        else:
            replace_file(unfinished, path, "name")
        return _info(key, os.stat(path))

    async def _off_loop(self, did: str, key: str, call: Callable[..., T], *args: object) -> T:
        try:
            return await asyncio.to_thread(call, *args)
        except OSError as error:
            raise self._translated(did, key, error) from None

    def _translated(self, did: str, key: str, error: OSError) -> OriginError:
        found = error.strerror or type(error).__name__
        kind: type[OriginError] = OriginError
        match error:
            case FileNotFoundError() | NotADirectoryError() | IsADirectoryError():
                kind = OriginNotFoundError
            case PermissionError():
                kind = OriginDeniedError
        return origin_error(kind, did, found, "check the path and its rights", origin=self.url, key=key)

    def _short(self, key: str, start: int, end: int, size: int) -> OriginError:
        return corrupt_error(f"read bytes {start} to {end} of", f"it has {size} bytes", origin=self.url, key=key)

    def _exists(self, key: str) -> OriginError:
        found, advice = "there is an object of that name", "give it another name, or delete that one"
        return origin_error(OriginExistsError, "write", found, advice, origin=self.url, key=key)


def _info(key: str, stat: os.stat_result) -> ObjectInfo:
    if not S_ISREG(stat.st_mode):
        raise FileNotFoundError(2, "it is not a file")
    return ObjectInfo(key, stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}", stat.st_mtime)


def _make_folder(folder: Path) -> None:
    """Create a folder and those above it, so that a power cut does not lose them."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        fsync_dir(one.parent)


def _chunks(body: bytes | Path) -> Iterator[bytes]:
    if isinstance(body, bytes):
        return (body[at : at + 4 * CHUNK_BYTES] for at in range(0, len(body), 4 * CHUNK_BYTES))
    return _of_file(body.open("rb"))


def _of_file(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(4 * CHUNK_BYTES):
            yield chunk


def _copy_one(chunks: Iterator[bytes], target: BinaryIO) -> int:
    return target.write(next(chunks, b""))
