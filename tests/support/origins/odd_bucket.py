"""A stand-in of an S3 server with a bucket of any keys: those that Amazon keeps, and SeaweedFS changes or refuses.

SeaweedFS stores `a//b` and `a\\b` as `a/b` and `/a` as `a`, and refuses steps of `.` and `..`. Amazon changes none.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import parse_qs, quote, quote_plus, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.origins.servers import close_server

GOOD = ("a/1", "a/2 +ä%41", "b/3", "dot./.hidden/..x", "z")
"""Keys that can be read."""
REFUSED = ("a//1", "/a/1", "./a", "a/./1", "../a", "a/../b", "..", "a/..", "a\n1", "a/\t1", "a\\1", "a/\x7f", "data/")
"""Keys of objects that have bytes, and that cannot be read."""
STORED_BY_SEAWEED = tuple(key for key in REFUSED if re.search("[\n\t\x7f]", key))
"""Those that SeaweedFS keeps as they are."""
MARKERS = ("a/", "empty/", "nested//")
"""Folder markers: they have no bytes."""
_HEAD = "HTTP/1.1 {} Status\r\nContent-Length: {}\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n"


@dataclass
class OddBucket:
    """The bucket `shards`. It lists, reads and deletes; signatures are not looked at."""

    objects: dict[str, bytes]
    page_size: int = 3
    """Keys of one page of a listing."""
    gives_tokens: bool = True
    """False: it says that there are more keys, and not how to get them."""
    statuses: list[int] = field(default_factory=list)
    """The statuses of the next answers; then answers are correct."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and target of each request."""
    port: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
                method, target, _ = first.split(" ")
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
                await reader.readexactly(int(headers.get("content-length", "0")))
                self.requests.append((method, target))
                status, more, body = self._answer(method, target, headers)
                head = "".join(f"{name}: {value}\r\n" for name, value in more.items())
                writer.write(f"{_HEAD.format(status, len(body))}{head}\r\n".encode())
                writer.write(b"" if method == "HEAD" else body)
                await writer.drain()
        writer.close()

    def _answer(self, method: str, target: str, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        if self.statuses:
            return self.statuses.pop(0), {}, b""
        parts = urlsplit(target)
        if "list-type" in (query := parse_qs(parts.query)):
            return 200, {}, self._page({name: values[0] for name, values in query.items()}).encode()
        key = unquote(parts.path.removeprefix("/shards/"))
        if method == "DELETE":
            self.objects.pop(key, None)
            return 204, {}, b""
        if key not in self.objects:
            return 404, {}, b""
        body = self.objects[key]
        described = {"ETag": f'"{_md5(body)}"'}
        if not (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))):
            return 200, described, body
        start, end = int(wanted[1]), min(int(wanted[2] or len(body)) + 1, len(body))
        return 206, described | {"Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}, body[start:end]

    def _page(self, query: Mapping[str, str]) -> str:
        keys = sorted((key for key in self.objects if key.startswith(query.get("prefix", ""))), key=str.encode)
        begin = int(query.get("continuation-token", "0"))
        end = begin + self.page_size
        # As Amazon: a space is a plus sign in an encoded key, and a control character is in no other one.
        encoded = query.get("encoding-type") == "url"
        found = "".join(
            f"<Contents><Key>{quote_plus(key, safe='/') if encoded else escape(key)}</Key>"
            f"<Size>{len(self.objects[key])}</Size><ETag>&quot;{_md5(self.objects[key])}&quot;</ETag>"
            "<LastModified>2015-10-21T07:28:00.000Z</LastModified></Contents>"
            for key in keys[begin:end]
        )
        more = f"<NextContinuationToken>{quote(str(end))}</NextContinuationToken>" if self.gives_tokens else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>shards</Name>'
            f"<IsTruncated>{str(end < len(keys)).lower()}</IsTruncated>{more if end < len(keys) else ''}"
            f"{'<EncodingType>url</EncodingType>' if encoded else ''}{found}</ListBucketResult>"
        )


def odd_objects(prefix: str = "") -> dict[str, bytes]:
    """Objects under all of these keys; those that can be read hold their key."""
    objects = {prefix + key: (prefix + key).encode() for key in (*GOOD, *REFUSED)}
    return objects | {prefix + key: b"" for key in MARKERS}


@asynccontextmanager
async def odd_bucket(objects: dict[str, bytes]) -> AsyncIterator[OddBucket]:
    """An OddBucket that runs."""
    bucket = OddBucket(objects)
    listening = await asyncio.start_server(bucket.serve, "127.0.0.1", 0)
    bucket.port = listening.sockets[0].getsockname()[1]
    async with listening:
        try:
            yield bucket
        finally:
            await close_server(listening, bucket.writers)


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
