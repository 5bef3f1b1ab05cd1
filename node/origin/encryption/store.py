"""An object store on top of another one: what leaves the machine is encrypted and authenticated."""

from __future__ import annotations

import asyncio
import io
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from cryptography.exceptions import InvalidTag

from node.origin.core.errors import corrupt_error, origin_error
from node.origin.core.listing import warn_of_left_out
from node.origin.encryption.frames import (
    FRAME_BYTES,
    HEADER_BYTES,
    MAGIC,
    STORED_FRAME,
    ObjectCipher,
    frames_of,
    open_all,
    plain_size,
    stored_size,
)
from node.origin.encryption.keys import check_key_length
from node.origin.interface import ObjectInfo, ObjectStore, OnBytes
from protocol.errors import OriginCorruptError, OriginError

_KEPT_HEADERS = 256
_FRAMES_AT_ONCE = 16
_BATCH_BYTES = _FRAMES_AT_ONCE * STORED_FRAME


class EncryptedStore:
    """An ObjectStore. Reads raise OriginCorruptError for anything that was not written with this key under this name.

    A file is encrypted into a temporary file in `spool` before it is sent; None: the system's folder for such files.
    Each put encrypts with a new salt, so an upload that broke off starts from the beginning.
    """

    def __init__(self, inner: ObjectStore, key: bytes, spool: Path | None = None) -> None:
        self._inner, self._key, self._spool = inner, check_key_length(key), spool
        self._known: OrderedDict[str, ObjectCipher] = OrderedDict()
        self.url = inner.url
        self.writes_once = inner.writes_once
        self.range_unit_bytes = inner.range_unit_bytes
        self.min_object_bytes = max(0, inner.min_object_bytes - stored_size(0))

    async def head(self, key: str) -> ObjectInfo:
        """See ObjectStore. The size is that of the plain bytes; no byte of the object is checked."""
        return self._plain_info(await self._inner.head(key))

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        """See ObjectStore."""
        return (await self.get_ranges(key, [(start, end)]))[0]

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See ObjectStore."""
        known = key in self._known
        try:
            return await self._get_ranges(key, ranges)
        except OriginCorruptError:
            if not known:
                raise
            return await self._get_ranges(key, ranges)  # it may have been written again: its new header is read

    async def _get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        cipher = await self._cipher(key)
        for start, end in ranges:
            self._check_range(key, cipher.size, start, end)
        not_empty = [one for one in ranges if one[0] < one[1]]
        with self._as_ours(key):
            stored = (
                await self._inner.get_ranges(key, [cipher.stored_span(*one) for one in not_empty]) if not_empty else []
            )
            found = iter(await asyncio.to_thread(open_all, cipher, not_empty, stored))
        return [next(found) if start < end else b"" for start, end in ranges]

    async def get_stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See ObjectStore. Every byte that is yielded has been authenticated."""
        known, given = key in self._known, False
        try:
            async for part in self._stream(key, start, end):
                given = True
                yield part
            return
        except OriginCorruptError:
            if given or not known:
                raise
        async for part in self._stream(key, start, end):
            yield part

    async def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        """See ObjectStore. `metadata` is not encrypted."""
        self._known.pop(key, None)
        if isinstance(body, bytes):
            sealed = await asyncio.to_thread(self._sealed, key, body)
            info = await self._put(key, sealed, len(body), if_absent, metadata, on_bytes)
        else:
            with self._spooled(key) as path:
                size = await self._seal_file(key, body, path)
                info = await self._put(key, path, size, if_absent, metadata, on_bytes)
        self._known.pop(key, None)
        return self._plain_info(info)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See ObjectStore. Leaves out objects whose size is not that of an encrypted one, with a warning."""
        found, refused = list[ObjectInfo](), list[str]()
        async for info in self._inner.list(prefix):
            try:
                found.append(replace(info, size=plain_size(info.size)))
            except ValueError:
                refused.append(info.key)
        if refused:
            why = "are not encrypted, by their sizes: read them without a key file, or publish them again with it"
            warn_of_left_out(self.url, prefix, refused, len(refused) + len(found), why)
        for info in found:
            yield info

    async def delete(self, key: str) -> None:
        """See ObjectStore."""
        self._known.pop(key, None)
        await self._inner.delete(key)

    async def close(self) -> None:
        """See ObjectStore."""
        self._known.clear()
        await self._inner.close()

    async def _put(
        self,
        key: str,
        sealed: bytes | Path,
        size: int,
        if_absent: bool,
        metadata: Mapping[str, str] | None,
        on_bytes: OnBytes | None,
    ) -> ObjectInfo:
        count = _PlainCount(on_bytes, size) if on_bytes else None
        return await self._inner.put(key, sealed, if_absent=if_absent, metadata=metadata, on_bytes=count)

    async def _stream(self, key: str, start: int, end: int | None) -> AsyncIterator[bytes]:
        cipher = await self._cipher(key)
        end = cipher.size if end is None else end
        self._check_range(key, cipher.size, start, end)
        if start == end:
            return
        at, stop = cipher.stored_span(start, end)
        index, skip, left, begun = start // FRAME_BYTES, start % FRAME_BYTES, end - start, bytearray()
        with self._as_ours(key):
            async for part in self._inner.get_stream(key, at, stop):
                begun += part
                at += len(part)
                while len(begun) >= _BATCH_BYTES or (begun and at >= stop):
                    frames = bytes(begun[:_BATCH_BYTES])
                    del begun[:_BATCH_BYTES]
                    plain = await asyncio.to_thread(cipher.open_frames, index, frames)
                    index += _FRAMES_AT_ONCE
                    plain, skip = plain[skip : skip + left], 0
                    left -= len(plain)
                    yield plain
            if left:
                raise corrupt_error("read", f"{left} bytes of the range are missing", origin=self.url, key=key)

    async def _cipher(self, key: str) -> ObjectCipher:
        cipher = self._known.get(key)
        if cipher is None:
            info = await self._inner.head(key)
            size = self._plain_info(info).size
            header = await self._inner.get_range(key, 0, HEADER_BYTES)
            if not header.startswith(MAGIC):
                raise self._not_ours(key, "it is not encrypted, or in another format")
            cipher = self._known[key] = ObjectCipher.of(self._key, header, key, size)
            while len(self._known) > _KEPT_HEADERS:
                self._known.popitem(last=False)
        return cipher

    def _sealed(self, key: str, plain: bytes) -> bytes:
        out = io.BytesIO()
        self._seal(key, io.BytesIO(plain), len(plain), out, threading.Event())
        return out.getvalue()

    async def _seal_file(self, key: str, body: Path, sealed: Path) -> int:
        given_up = threading.Event()
        with body.open("rb") as source, sealed.open("wb") as out:
            size = os.fstat(source.fileno()).st_size
            try:
                await asyncio.to_thread(self._seal, key, source, size, out, given_up)
            except OSError as error:
                raise self._no_room(key, error) from error
            finally:
                given_up.set()
        return size

    def _seal(self, key: str, source: BinaryIO, size: int, out: BinaryIO, given_up: threading.Event) -> None:
        header = MAGIC + os.urandom(HEADER_BYTES - len(MAGIC))
        cipher = ObjectCipher.of(self._key, header, key, size)
        out.write(header)
        for index in range(frames_of(size)):
            plain = source.read(FRAME_BYTES)
            if given_up.is_set():
                return
            if len(plain) != min(FRAME_BYTES, size - index * FRAME_BYTES):
                raise OSError("the file was changed in the meantime")
            out.write(cipher.seal(index, plain))
        out.flush()

    @contextmanager
    def _spooled(self, key: str) -> Iterator[Path]:
        try:
            folder = tempfile.TemporaryDirectory(prefix="shoal-seal-", dir=self._spool)
        except OSError as error:
            raise self._no_room(key, error) from error
        with folder as name:
            yield Path(name) / "object"

    def _no_room(self, key: str, error: OSError) -> OriginError:
        found = f"it cannot be encrypted into a temporary file: {error.strerror or error}"
        advice = "it needs as much free disk as the object has bytes; set TMPDIR to use another folder"
        return origin_error(OriginError, "write", found, advice, origin=self.url, key=key)

    @contextmanager
    def _as_ours(self, key: str) -> Iterator[None]:
        try:
            yield
        except InvalidTag:
            self._known.pop(key, None)
            raise self._not_ours(key, "its bytes were changed, or it was written with another key or name") from None
        except OriginCorruptError:
            self._known.pop(key, None)
            raise

    def _check_range(self, key: str, size: int, start: int, end: int) -> None:
        if not 0 <= start <= end <= size:
            self._known.pop(key, None)
            found = f"bytes [{start}, {end}) were asked for, and it has {size}"
            raise corrupt_error("read", found, origin=self.url, key=key)

    def _plain_info(self, info: ObjectInfo) -> ObjectInfo:
        try:
            return replace(info, size=plain_size(info.size))
        except ValueError:
            raise self._not_ours(info.key, f"no encrypted object has {info.size} bytes") from None

    def _not_ours(self, key: str, found: str) -> OriginError:
        advice = "check the encryption key file, or publish it again"
        return origin_error(OriginCorruptError, "read", found, advice, origin=self.url, key=key)


class _PlainCount:
    """Reports plain bytes while encrypted ones are sent: never too many, and all of them at the end."""

    def __init__(self, on_bytes: OnBytes, size: int) -> None:
        self._on_bytes, self._size = on_bytes, size
        self._stored = self._reported = 0

    def __call__(self, count: int) -> None:
        self._stored += count
        done = min(self._size, self._stored * self._size // stored_size(self._size))
        if done > self._reported:
            self._on_bytes(done - self._reported)
            self._reported = done
