"""s3:// and o3:// through obstore: the objects of one bucket, read in ranges, written whole or in parts, and listed.

Addresses are path-style, requests are signed (SigV4), and no checksum header is sent, which O3 refuses. obstore's own
retries are off: after a broken body it would go on without asking whether the object is still the same, and it does not
wait as long as a server asks. Listings come from botocore: one key with `//`, `.`, `..` or a newline ends obstore's.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import obstore

from node.clock import Clock
from node.origin.core.errors import corrupt_error, listing_too_long_error, origin_error, unreachable_error
from node.origin.core.fork_guard import expect_own_process, expect_works
from node.origin.core.listing import readable_objects
from node.origin.core.ranges import read_joined
from node.origin.core.retry import RetryLoop
from node.origin.interface import MAX_LISTED, ObjectInfo, OnBytes
from node.origin.s3.access import S3Access
from node.origin.s3.botocore_client import S3ApiClient, S3StoreCalls
from node.origin.s3.errors import S3ErrorTranslator
from node.origin.s3.upload import ObjectUpload, PartsUpload, read_part
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import (
    OriginDeniedError,
    OriginError,
    OriginExistsError,
    OriginNotFoundError,
)

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult
    from obstore.store import S3Store as Client

STREAM_CHUNK_BYTES = 16_384
"""The least that a stream yields at a time. If a connection breaks, obstore drops what it has of the next part."""
SLOWEST_BYTES_S = 32_768
"""A body that is sent more slowly is given up."""
O3_MIN_OBJECT_BYTES = 127
"""Akave's network takes no smaller objects, whichever way they come."""


class S3Store:
    """The objects of one bucket under one prefix. Only the process that opened it may use it."""

    writes_once = False
    range_unit_bytes = 1

    def __init__(self, url: OriginUrl, settings: OriginSettings, clock: Clock | None = None) -> None:
        self.url = str(url)
        self.min_object_bytes = O3_MIN_OBJECT_BYTES if url.scheme == "o3" else 0
        self._origin_url = url
        self._access = S3Access.of(url, settings)
        self._failures = S3ErrorTranslator(self.url, self._access.credentials_from)
        self._retry = RetryLoop(settings.retry_total_s, clock=clock or Clock())
        self._part_bytes = settings.s3_part_bytes
        self._read_timeout_s = settings.read_timeout_s
        self._clients: dict[bool, Client] = {}
        self._calls = S3StoreCalls(self._access, self._failures)
        self._process = os.getpid()

    async def head(self, key: str) -> ObjectInfo:
        """See ObjectStore."""
        full = self._origin_url.full_key(key)

        async def ask() -> ObjectInfo:
            found = await self._get("ask for", key, full, {"head": True})
            return object_info(key, found.meta, found.attributes)

        return await self._retry.run(ask)

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        """See ObjectStore."""
        if start == end:
            return b""
        full, did = self._origin_url.full_key(key), f"read bytes {start} to {end} of"

        async def ask() -> bytes:
            client = self._open()
            try:
                data = bytes(await obstore.get_range_async(client, full, start=start, end=end))
            except Exception as error:
                raise self._failures.of_obstore(error, did, key) from None
            if len(data) != end - start:
                # obstore checks the announced range, which may end with the object, and not the bytes that came.
                size = (await self._get(did, key, full, {"head": True})).meta["size"]
                found = f"{len(data)} bytes came" if size >= end else f"it has {size} bytes"
                raise corrupt_error(did, found, origin=self.url, key=key, broke_off=size >= end)
            return data

        return await self._retry.run(ask)

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See ObjectStore. (obstore's own `get_ranges` panics if a range begins behind the object's end.)"""
        return await read_joined(ranges, lambda start, end: self.get_range(key, start, end))

    async def get_stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See ObjectStore. The request is repeated only until its first byte comes."""
        if start == end:
            return
        full = self._origin_url.full_key(key)
        did = f"read from byte {start} of" if end is None else f"read bytes {start} to {end} of"
        options: GetOptions = {}
        if end is not None:
            options = {"range": (start, end)}
        elif start:
            options = {"range": {"offset": start}}

        async def begin() -> tuple[Any, bytes, int]:
            found = await self._get(did, key, full, options)
            stop = found.meta["size"] if end is None else end
            self._expect(found, (start, stop), did, key)
            steps = found.stream(min_chunk_size=STREAM_CHUNK_BYTES)
            return steps, await self._step(steps, did, key), stop - start

        steps, data, left = await self._retry.run(begin)
        while data:
            left -= len(data)
            if left < 0:
                break
            yield data
            data = await self._step(steps, did, key) if left else b""
        if left:
            found = "more bytes came than it announced" if left < 0 else f"its answer ended {left} bytes early"
            raise corrupt_error(did, found, origin=self.url, key=key, broke_off=left > 0)

    async def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        """See ObjectStore. Above twice `s3_part_bytes` it goes in parts; parts that the server has are not sent."""
        try:
            return await self._put(key, body, if_absent, metadata, on_bytes)
        except OSError as error:
            found = f"{body if isinstance(body, Path) else 'the body'} cannot be read: {error.strerror}"
            raise origin_error(OriginError, "write", found, "check that file", origin=self.url, key=key) from None

    async def _put(
        self,
        key: str,
        body: bytes | Path,
        if_absent: bool,
        metadata: Mapping[str, str] | None,
        on_bytes: OnBytes | None,
    ) -> ObjectInfo:
        full, size = self._origin_url.full_key(key), len(body) if isinstance(body, bytes) else body.stat().st_size
        if size < self.min_object_bytes:
            found, advice = f"it has {size} bytes, and Akave takes none below {self.min_object_bytes}", "pad it"
            raise origin_error(OriginError, "write", found, advice, origin=self.url, key=key)
        expect_own_process(self.url, self._process)
        if if_absent:
            await self._expect_none(key)
        if size > 2 * self._part_bytes:
            async with S3ApiClient(self._access, self._failures) as client:
                upload = ObjectUpload(
                    full, key, body, size, self._part_bytes, if_absent, dict(metadata or {}), on_bytes
                )
                etag = await PartsUpload(client, self._retry, upload).run()
        else:
            data = await read_part(body, 0, size)
            etag = await self._put_whole(key, full, data, if_absent, metadata)
            if on_bytes is not None and size:
                on_bytes(size)
        return ObjectInfo(key, size, etag, datetime.now(UTC).timestamp(), dict(metadata or {}))

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See ObjectStore. All of it is kept and sorted first: SeaweedFS lists by folder, not in the order of keys."""
        if folder := prefix.rpartition("/")[0]:
            self._origin_url.full_key(folder)

        async def ask() -> list[ObjectInfo]:
            found: list[ObjectInfo] = []
            async for page in self._pages(prefix):
                found += page
                if len(found) > MAX_LISTED:
                    raise listing_too_long_error(prefix, origin=self.url)
            return found

        for info in readable_objects(await self._retry.run(ask), self._origin_url, prefix):
            yield info

    async def _pages(self, prefix: str) -> AsyncIterator[Sequence[ObjectInfo]]:
        """The objects whose relative key begins with `prefix`, page by page, as the server has them."""
        inside = f"{self._origin_url.prefix}/" if self._origin_url.prefix else ""
        more: dict[str, str] = {}
        while True:
            page = await self._calls.answer("list_objects_v2", "list", prefix, Prefix=inside + prefix, **more)
            yield [
                info_by_botocore(one["Key"].removeprefix(inside), one)
                for one in page.get("Contents") or ()
                if one["Key"].startswith(inside + prefix)
            ]
            if not page.get("IsTruncated"):
                return
            token = page.get("NextContinuationToken")
            if not token or token == more.get("ContinuationToken"):
                found, advice = "its answer says that there is more, and not how to get it", "name another origin"
                raise origin_error(OriginError, "list", found, advice, origin=self.url, key=prefix)
            more = {"ContinuationToken": token}

    async def delete(self, key: str) -> None:
        """See ObjectStore."""
        full = self._origin_url.full_key(key)

        client = self._open()

        async def ask() -> None:
            try:
                await obstore.delete_async(client, full)
            except FileNotFoundError:
                return
            except Exception as error:
                raise self._failures.of_obstore(error, "delete", key) from None

        await self._retry.run(ask)

    async def close(self) -> None:
        """See ObjectStore."""
        self._clients.clear()
        self._calls.close()

    def _open(self, *, writes: bool = False) -> Client:
        expect_own_process(self.url, self._process)
        if writes not in self._clients:
            expect_works("obstore", self.url)
            self._clients[writes] = self._access.client(writes=writes)
        return self._clients[writes]

    async def _get(self, did: str, key: str, full: str, options: GetOptions) -> GetResult:
        client = self._open()
        try:
            return await obstore.get_async(client, full, options=options)
        except Exception as error:
            raise self._failures.of_obstore(error, did, key) from None

    async def _step(self, steps: Any, did: str, key: str) -> bytes:
        """The next bytes of a stream; empty at its end."""
        try:
            return bytes(await anext(steps, b""))
        except Exception as error:
            raise self._failures.of_obstore(error, did, key) from None

    def _expect(self, found: GetResult, expected: tuple[int, int], did: str, key: str) -> None:
        if found.range != expected:
            # obstore refuses any other answer: this range ends where the object does.
            raise corrupt_error(did, f"it has {found.meta['size']} bytes", origin=self.url, key=key)

    async def _put_whole(
        self, key: str, full: str, data: bytes, if_absent: bool, metadata: Mapping[str, str] | None
    ) -> str | None:
        client, conditional = self._open(writes=True), if_absent

        async def ask() -> str | None:
            nonlocal conditional
            mode: Literal["create", "overwrite"] = "create" if conditional else "overwrite"
            try:
                put = obstore.put_async(
                    client, full, data, mode=mode, attributes=dict(metadata or {}), use_multipart=False
                )
                async with asyncio.timeout(self._read_timeout_s + len(data) / SLOWEST_BYTES_S):
                    return plain_etag((await put)["e_tag"])
            except TimeoutError:
                raise unreachable_error("write", "no answer in time", origin=self.url, key=key) from None
            except Exception as error:
                mine = self._failures.of_obstore(error, "write", key)
                if conditional and mine.details["status"] == "501":
                    conditional = False
                    return await ask()
                raise mine from None

        return await self._retry.run(ask)

    async def _expect_none(self, key: str) -> None:
        # Some servers ignore the condition of a put, so the object is looked for before it as well.
        try:
            await self.head(key)
        except (OriginNotFoundError, OriginDeniedError):
            return
        found, advice = "there is an object of that name", "give it another name, or delete that one"
        raise origin_error(OriginExistsError, "write", found, advice, origin=self.url, key=key)


def plain_etag(etag: str | None) -> str | None:
    """The ETag without the quotes that HTTP has around it."""
    return etag.strip('"') if etag else None


def object_info(key: str, meta: Mapping[str, Any], attributes: Mapping[Any, str]) -> ObjectInfo:
    """An object, from obstore's `ObjectMeta` and attributes."""
    metadata = {str(name): value for name, value in attributes.items()}
    return _info(key, meta["size"], meta["e_tag"], meta["last_modified"], metadata)


def info_by_botocore(key: str, answer: Mapping[str, Any]) -> ObjectInfo:
    """An object, from botocore's answer to a HEAD or from one entry of its listing."""
    size = answer["Size"] if "Size" in answer else answer["ContentLength"]
    return _info(key, size, answer.get("ETag"), answer.get("LastModified"), dict(answer.get("Metadata") or {}))


def _info(key: str, size: int, etag: str | None, modified: datetime | None, metadata: Mapping[str, str]) -> ObjectInfo:
    by_name = {name.lower(): value for name, value in metadata.items()}
    return ObjectInfo(
        key=key,
        size=size,
        etag=plain_etag(etag),
        modified_s=modified.timestamp() if modified else None,
        metadata=metadata,
        root_cid=by_name.get("network-root-cid") or None,
        network_state=by_name.get("network-state") or None,
    )
