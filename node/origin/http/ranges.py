"""Objects behind plain URLs, read in ranges over HTTP: for https:// and hf://."""

from __future__ import annotations

import email.utils
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import suppress

import aiohttp

from node.clock import Clock
from node.origin.core.errors import corrupt_error, origin_error
from node.origin.core.ranges import read_joined
from node.origin.core.retry import RetryLoop
from node.origin.http.requests import HttpClient, ObjectRequest
from node.origin.interface import ObjectInfo
from node.origin.settings import OriginSettings
from protocol.errors import OriginError

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class HttpRangeReader:
    """Reads of one origin; `headers` go to its own host alone. For the process and the event loop that use it first."""

    def __init__(
        self,
        origin: str,
        settings: OriginSettings,
        headers: Mapping[str, str] | None = None,
        credentials: str = "",
        *,
        clock: Clock | None = None,
    ) -> None:
        """`credentials` says in words where the origin's credentials come from, for messages."""
        self._origin = origin
        self._client = HttpClient(origin, settings, headers or {}, credentials)
        self._retry = RetryLoop(settings.retry_total_s, clock=clock or Clock())

    async def head(self, url: str, key: str) -> ObjectInfo:
        """Size, ETag and time. Raises OriginError and its children, as every method does."""
        request = ObjectRequest(url, key, "ask for")

        async def ask() -> ObjectInfo:
            async with await self._client.answer("HEAD", request) as answer:
                if (size := _size(answer.headers)) is not None:
                    return _info(key, size, answer.headers)
            # Some servers know the length only while they send it.
            answer = await self._client.answer("GET", request, {"Range": "bytes=0-0"})
            answer.close()
            found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            size = int(found[3]) if found and found[3] != "*" else None if found else _size(answer.headers)
            if size is None:
                advice = "name another origin"
                raise origin_error(OriginError, request.did, "it tells no size", advice, origin=self._origin, key=key)
            return _info(key, size, answer.headers)

        return await self._retry.run(ask)

    async def read(self, url: str, key: str, start: int, end: int) -> bytes:
        """Exactly the bytes [start, end). Raises OriginCorruptError if another number comes."""
        if start == end:
            return b""
        request = ObjectRequest(url, key, f"read bytes {start} to {end} of")

        async def ask() -> bytes:
            answer, size = await self._begin(request, start, end)
            try:
                return b"".join([data async for data in self._body(answer, request, size)])
            finally:
                answer.close()

        return await self._retry.run(ask)

    async def read_many(self, url: str, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of several ranges; close ones share a request, and the requests go side by side."""
        return await read_joined(ranges, lambda start, end: self.read(url, key, start, end))

    async def stream(self, url: str, key: str, start: int, end: int | None) -> AsyncGenerator[bytes, None]:
        """The bytes [start, end) as they come. The request is repeated only until an answer begins."""
        if start == end:
            return
        request = ObjectRequest(
            url, key, f"read from byte {start} of" if end is None else f"read bytes {start} to {end} of"
        )
        answer, size = await self._retry.run(lambda: self._begin(request, start, end))
        try:
            async for data in self._body(answer, request, size):
                yield data
        finally:
            answer.close()

    async def close(self) -> None:
        """Close the connections; the next call opens them again."""
        await self._client.close()

    async def _begin(
        self, request: ObjectRequest, start: int, end: int | None
    ) -> tuple[aiohttp.ClientResponse, int | None]:
        """An answer that holds the range, and the number of bytes that it announces; None if it does not say."""
        range_header = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        answer = await self._client.answer("GET", request, range_header)
        try:
            return answer, self._promised(answer, request, start, end)
        except BaseException:
            answer.close()
            raise

    def _promised(
        self, answer: aiohttp.ClientResponse, request: ObjectRequest, start: int, end: int | None
    ) -> int | None:
        length, encoding = _size(answer.headers), answer.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise self._corrupt(request, f"the answer is encoded by {encoding}, which was not asked for")
        if answer.status == 200:
            if start == 0 and (end is None or length == end):
                return length
            raise self._corrupt(request, "it ignores Range and answered 200 with the whole object")
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status != 206 or not found:
            raise self._corrupt(request, f"the answer was {answer.status} and does not say which range it is")
        first, stop, total = int(found[1]), int(found[2]) + 1, found[3]
        expected = end if end is not None else int(total) if total != "*" else stop
        if (first, stop) != (start, expected):
            raise self._corrupt(request, f"bytes {first} to {stop} of {total} came")
        return stop - start

    async def _body(
        self, answer: aiohttp.ClientResponse, request: ObjectRequest, size: int | None
    ) -> AsyncIterator[bytes]:
        left = size
        async for data in self._client.body(answer, request):
            if left is not None:
                left -= len(data)
                if left < 0:
                    raise self._corrupt(request, "more bytes came than it announced")
            yield data
        if left:
            raise self._corrupt(request, f"its answer ended {left} bytes early", broke_off=True)

    def _corrupt(self, request: ObjectRequest, found: str, *, broke_off: bool = False) -> OriginError:
        return corrupt_error(request.did, found, origin=self._origin, key=request.key, broke_off=broke_off)


def _size(headers: Mapping[str, str]) -> int | None:
    text = headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _info(key: str, size: int, headers: Mapping[str, str]) -> ObjectInfo:
    etag = headers.get("ETag")
    modified = None
    with suppress(ValueError):
        modified = email.utils.parsedate_to_datetime(headers.get("Last-Modified", "")).timestamp()
    return ObjectInfo(key, size, etag.removeprefix("W/").strip('"') if etag else None, modified)
