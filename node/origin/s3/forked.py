"""s3:// and o3:// through botocore, in threads: for a process in which obstore would hang.

Such a process was forked from one that used obstore, as the workers of PyTorch's DataLoader are by default. Checks and
errors are those of S3Store; ranges of 8 MiB come at 0.6 to 1.0 of obstore's speed, ranges of 64 KiB at 0.6, and the
first call takes 0.4 s.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from node.origin.core.errors import corrupt_error
from node.origin.interface import ObjectInfo
from node.origin.s3.store import S3Store, info_by_botocore, plain_etag
from protocol.errors import OriginError, OriginNotFoundError

STEP_BYTES, STEP_S = 1 << 20, 0.25
"""A thread that reads for a stream returns after so many bytes or so many seconds."""
READ_BYTES = 1 << 16
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class S3ForkedStore(S3Store):
    """S3Store through botocore."""

    async def head(self, key: str) -> ObjectInfo:
        """See ObjectStore."""
        full = self._origin_url.full_key(key)

        async def ask() -> ObjectInfo:
            return info_by_botocore(key, await self._calls.answer("head_object", "ask for", key, Key=full))

        return await self._retry.run(ask)

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        """See ObjectStore."""
        if start == end:
            return b""
        full, did = self._origin_url.full_key(key), f"read bytes {start} to {end} of"

        def read() -> bytes:
            body, _ = self._body(did, key, full, start, end)
            try:
                return bytes(body.read())
            except Exception as error:
                raise self._failures.of_broken_body(error, did, key) from None
            finally:
                body.close()

        async def ask() -> bytes:
            data = await self._calls.run(read, did, key)
            if len(data) != end - start:
                raise corrupt_error(
                    did, f"{len(data)} bytes came", origin=self.url, key=key, broke_off=len(data) < end - start
                )
            return data

        return await self._retry.run(ask)

    async def get_stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See ObjectStore. The request is repeated only until its answer begins."""
        if start == end:
            return
        full = self._origin_url.full_key(key)
        did = f"read from byte {start} of" if end is None else f"read bytes {start} to {end} of"

        async def begin() -> tuple[Any, int]:
            return await self._calls.run(partial(self._body, did, key, full, start, end), did, key)

        body, left = await self._retry.run(begin)
        reader = _BodyReader(body, lambda error: self._failures.of_broken_body(error, did, key))
        try:
            while left and (data := await self._calls.run(reader.next, did, key)):
                left -= len(data)
                if left < 0:
                    raise corrupt_error(did, "more bytes came than it announced", origin=self.url, key=key)
                yield data
            if left:
                found = f"its answer ended {left} bytes early"
                raise corrupt_error(did, found, origin=self.url, key=key, broke_off=True)
        finally:
            reader.end()

    async def delete(self, key: str) -> None:
        """See ObjectStore."""
        full = self._origin_url.full_key(key)

        async def ask() -> None:
            with suppress(OriginNotFoundError):
                await self._calls.answer("delete_object", "delete", key, Key=full)

        await self._retry.run(ask)

    async def _put_whole(
        self, key: str, full: str, data: bytes, if_absent: bool, metadata: Mapping[str, str] | None
    ) -> str | None:
        conditional = if_absent

        async def ask() -> str | None:
            nonlocal conditional
            only = {"IfNoneMatch": "*"} if conditional else {}
            params = {"Key": full, "Body": data, "Metadata": dict(metadata or {})}
            try:
                return plain_etag((await self._calls.answer("put_object", "write", key, **params, **only)).get("ETag"))
            except OriginError as error:
                if conditional and error.details["status"] == "501":
                    conditional = False
                    return await ask()
                raise

        return await self._retry.run(ask)

    def _body(self, did: str, key: str, full: str, start: int, end: int | None) -> tuple[Any, int]:
        """An answer's body, and the number of bytes that it announces. Blocks."""
        range_param = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        answer = self._calls.ask("get_object", did, key, {"Key": full, **range_param})
        try:
            return answer["Body"], self._promised(answer, bool(range_param), start, end, did, key)
        except BaseException:
            answer["Body"].close()
            raise

    def _promised(
        self, answer: Mapping[str, Any], ranged: bool, start: int, end: int | None, did: str, key: str
    ) -> int:
        if not ranged:
            return int(answer["ContentLength"])
        found = _CONTENT_RANGE.fullmatch(str(answer.get("ContentRange", "")))
        if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
            raise corrupt_error(did, "it ignores Range and answered with the whole object", origin=self.url, key=key)
        if not found:
            raise corrupt_error(did, "it did not say which range its answer is", origin=self.url, key=key)
        first, stop, total = int(found[1]), int(found[2]) + 1, found[3]
        expected = end if end is not None else int(total) if total != "*" else stop
        if (first, stop) != (start, expected):
            short = total != "*" and int(total) < expected
            said = f"it has {total} bytes" if short else f"it answered with bytes {first} to {stop}"
            raise corrupt_error(did, said, origin=self.url, key=key)
        return stop - start


class _BodyReader:
    """Reads a body in threads, up to a mebibyte a call. Bytes that came before an error are returned first."""

    def __init__(self, body: Any, translated: Callable[[Exception], OriginError]) -> None:
        self._body, self._translated = body, translated
        self._broke: OriginError | None = None
        self._reading = threading.Lock()
        self._ended = False

    def end(self) -> None:
        """Close the body, as soon as no thread reads from it."""
        self._ended = True
        if self._reading.acquire(blocking=False):
            self._body.close()
            self._reading.release()

    def next(self) -> bytes:
        """More bytes; empty at the end."""
        with self._reading:
            data = self._next()
        if self._ended:
            self._body.close()
        return data

    def _next(self) -> bytes:
        if self._broke is not None:
            raise self._broke
        parts, size, until = list[bytes](), 0, time.monotonic() + STEP_S
        try:
            while size < STEP_BYTES and time.monotonic() < until and not self._ended:
                if not (data := self._body.read(READ_BYTES)):
                    break
                parts.append(data)
                size += len(data)
        except Exception as error:
            self._broke = self._translated(error)
            if not parts:
                raise self._broke from None
        return b"".join(parts)
