"""akave://, and o3:// through the native SDK: the files of one bucket as an object store."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from node.clock import Clock
from node.origin.akave.chunks import SpooledChunk, SpooledChunks
from node.origin.akave.cid import CHUNK_BYTES, same_cid
from node.origin.akave.errors import translate
from node.origin.akave.sdk import INSTALL, LIST_LIMIT, MIN_OBJECT_BYTES, AkaveConnection, AkaveFile, sdk_is_importable
from node.origin.akave.upload import UploadReader
from node.origin.core.call_threads import CallThreads, StalledError
from node.origin.core.credentials import Secret
from node.origin.core.errors import origin_error
from node.origin.core.fork_guard import expect_own_process
from node.origin.core.listing import readable_objects
from node.origin.core.retry import RetryLoop
from node.origin.interface import ObjectInfo, OnBytes
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import (
    OriginCorruptError,
    OriginDeniedError,
    OriginError,
    OriginExistsError,
    OriginNotFoundError,
    OriginUnavailableError,
)

T = TypeVar("T")

_DOWNLOADS = 2
"""Chunks at a time: the SDK has each about three times in memory."""
_SMALL_CALLS = 4
_KEPT_CHUNKS = 4
_KEPT_INFOS = 1024
_PART_BYTES = 1 << 20


def open_akave_store(url: OriginUrl, settings: OriginSettings, clock: Clock | None = None) -> AkaveStore:
    """The bucket of an akave:// or o3:// URL. The SDK is imported, and the node reached, at the first call.

    Raises OriginError if the SDK is not installed, OriginDeniedError if there is no private key.
    """
    key = settings.credentials.akave_private_key
    if not sdk_is_importable():
        raise origin_error(OriginError, "open", "the akavesdk is not installed", INSTALL, origin=str(url), key="")
    if not key:
        raise origin_error(
            OriginDeniedError,
            "open",
            "the native Akave backend has no private key",
            "set AKAVE_PRIVATE_KEY or AKAVE_PRIVATE_KEY_FILE",
            origin=str(url),
            key="",
        )
    return AkaveStore(url, settings, key, clock or Clock())


class AkaveStore:
    """An ObjectStore. The name of a file is the URL's prefix and the key; a name is written once.

    Akave gives whole chunks of 32,000,000 bytes: `range_unit_bytes`. Close ranges share the chunks that were downloaded
    last; a reader that can choose asks for whole units. The SDK has no metadata: `put` drops it.
    """

    min_object_bytes = MIN_OBJECT_BYTES
    writes_once = True
    range_unit_bytes = CHUNK_BYTES

    def __init__(self, url: OriginUrl, settings: OriginSettings, private_key: Secret, clock: Clock) -> None:
        self.url = str(url)
        self._origin_url, self._bucket = url, url.container
        self._private_key = private_key
        self._sdk = AkaveConnection(
            node=settings.akave_node,
            ipc_node=settings.akave_ipc or settings.akave_node,
            private_key=private_key,
            connect_timeout_s=settings.connect_timeout_s,
        )
        self._small_s, self._large_s = settings.read_timeout_s, settings.timeout_s
        self._retry = RetryLoop(settings.retry_total_s, clock=clock)
        self._small, self._downloads, self._writes = CallThreads(_SMALL_CALLS), CallThreads(_DOWNLOADS), CallThreads(1)
        self._chunks = SpooledChunks(_KEPT_CHUNKS)
        self._infos: OrderedDict[str, ObjectInfo] = OrderedDict()
        self._pid = os.getpid()

    async def head(self, key: str) -> ObjectInfo:
        """See ObjectStore."""
        file = await self._retry.run(lambda: self._view("read", key))
        if file is None or file.size == 0:
            found = "there is no object of that name" if file is None else "its upload was begun and never finished"
            raise self._failed(OriginNotFoundError, "read", key, found, "check bucket, name and AKAVE_PRIVATE_KEY")
        self._infos[key] = info = _info(key, file)
        self._infos.move_to_end(key)
        while len(self._infos) > _KEPT_INFOS:
            self._infos.popitem(last=False)
        return info

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        """See ObjectStore. Whole chunks are downloaded, whatever the range."""
        return b"".join([part async for part in self.get_stream(key, start, end)])

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See ObjectStore."""
        found: dict[tuple[int, int], bytes] = {}
        for one in sorted(set(ranges)):  # in the order of the chunks, so that each is downloaded once
            found[one] = await self.get_range(key, *one)
        return [found[one] for one in ranges]

    async def get_stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See ObjectStore. One chunk at a time is in the SDK's memory; the last few are on disk."""
        info = self._infos.get(key) or await self.head(key)  # a name is written once, so what was known stays true
        end = info.size if end is None else end
        if not 0 <= start <= end <= info.size:
            found = f"bytes [{start}, {end}) were asked for, and it has {info.size}"
            raise self._failed(OriginCorruptError, "read", key, found, "ask for bytes that it has")
        while start < end:
            index, begin = divmod(start, CHUNK_BYTES)
            spool = await self._chunk(key, index, min(CHUNK_BYTES, info.size - index * CHUNK_BYTES))
            stop = min(end - index * CHUNK_BYTES, CHUNK_BYTES)
            for at in range(begin, stop, _PART_BYTES):
                yield spool.bytes_at(at, min(at + _PART_BYTES, stop))
            start = index * CHUNK_BYTES + stop

    async def put(
        self,
        key: str,
        body: bytes | Path,
        *,
        if_absent: bool = False,
        metadata: Mapping[str, str] | None = None,
        on_bytes: OnBytes | None = None,
    ) -> ObjectInfo:
        """See ObjectStore. Raises OriginExistsError if the name is taken, with `if_absent` or without.

        One upload at a time in this process. One that failed starts from the beginning: the SDK cannot continue it. The
        root CID of the bytes that were read is compared with the one that the SDK reports.
        """
        with body.open("rb") if isinstance(body, Path) else io.BytesIO(body) as source:
            size = source.seek(0, io.SEEK_END)
            source.seek(0)
            if size < MIN_OBJECT_BYTES:
                found = f"it has {size} bytes, and Akave takes no object below {MIN_OBJECT_BYTES}"
                raise self._failed(OriginError, "write", key, found, "pad it")
            file = await self._retry.run(lambda: self._view("write", key))
            if file is not None:
                advice = "use a new name: names on Akave are written once"
                found = "there is an object of that name"
                if file.size == 0:
                    found, advice = "an upload of it was begun and never finished", "delete it, then write it again"
                raise self._failed(OriginExistsError, "write", key, found, advice)
            return await self._upload(key, source, size, on_bytes)

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See ObjectStore. Raises OriginError if the bucket has LIST_LIMIT objects: there may be more."""
        files = await self._retry.run(
            lambda: self._call("list", prefix, lambda: self._sdk.files(self._bucket), self._small, self._small_s)
        )
        if len(files) >= LIST_LIMIT:
            found = f"the bucket has at least {LIST_LIMIT} objects, and the akavesdk lists no more than that"
            raise self._failed(OriginError, "list", prefix, found, "name one object, or use a bucket for each model")
        within = f"{self._origin_url.prefix}/" if self._origin_url.prefix else ""
        infos = (
            _info(file.name.removeprefix(within), file)
            for file in files
            if file.size and file.name.startswith(within + prefix)
        )
        for info in readable_objects(infos, self._origin_url, prefix):
            yield info

    async def delete(self, key: str) -> None:
        """See ObjectStore. The SDK does not wait for the deletion: the object may be visible for some seconds."""
        name = self._origin_url.full_key(key)
        if await self._retry.run(lambda: self._view("delete", key)) is not None:
            delete = lambda: self._sdk.delete(self._bucket, name)  # noqa: E731
            await self._transact(lambda: self._call("delete", key, delete, self._writes, self._large_s, queue=True))
        self._infos.pop(key, None)
        self._chunks.forget(key)

    async def create_bucket(self) -> bool:
        """Create the bucket; False if it exists already."""
        bucket = self._bucket
        has = await self._call("look", "", lambda: self._sdk.has_bucket(bucket), self._small, self._small_s)
        if not has:
            create = lambda: self._sdk.create_bucket(bucket)  # noqa: E731
            await self._transact(
                lambda: self._call("create the bucket", "", create, self._writes, self._large_s, queue=True)
            )
        return not has

    async def buckets(self) -> Sequence[str]:
        """The names of the account's buckets."""
        return await self._call("list buckets", "", self._sdk.buckets, self._small, self._small_s)

    async def ipc(self) -> Any:
        """The SDK's own object, connected. Its calls block, and it works until this store is closed."""
        return await self._call("connect", "", self._sdk.ipc, self._small, self._small_s)

    async def close(self) -> None:
        """See ObjectStore."""
        self._chunks.forget()
        await asyncio.to_thread(self._sdk.close)

    async def _upload(self, key: str, source: BinaryIO, size: int, on_bytes: OnBytes | None) -> ObjectInfo:
        name, loop = self._origin_url.full_key(key), asyncio.get_running_loop()
        reader = UploadReader(source, size, on_bytes and partial(_report, loop, on_bytes))
        upload = lambda: self._sdk.upload(self._bucket, name, reader)  # noqa: E731
        try:
            root_cid, sent = await self._transact(
                lambda: self._call("write", key, upload, self._writes, self._large_s, moved=reader.moved, queue=True)
            )
        except BaseException:
            reader.stop(OSError("the upload was given up"))
            raise
        expected = reader.root_cid() if reader.moved() and sent == size else "none"
        if not same_cid(root_cid, expected):
            found = f"{sent} of {size} bytes were sent, with the root CID {root_cid}; that of the bytes is {expected}"
            raise self._failed(OriginCorruptError, "write", key, found, "do not use the object (docs/akave.md)")
        reader.report_sent()
        return ObjectInfo(key, size, etag=root_cid, root_cid=root_cid)

    async def _view(self, did: str, key: str) -> AkaveFile | None:
        name = self._origin_url.full_key(key)
        return await self._call(did, key, lambda: self._sdk.view(self._bucket, name), self._small, self._small_s)

    async def _chunk(self, key: str, index: int, size: int) -> SpooledChunk:
        name = self._origin_url.full_key(key)

        async def fetch() -> SpooledChunk:
            try:
                spool = SpooledChunk(size)
            except OSError as error:
                found = f"no temporary file for its chunk: {error.strerror}"
                raise self._failed(OriginError, "read", key, found, "TMPDIR names another folder") from error
            download = lambda: self._sdk.download_chunk(self._bucket, name, index, spool)  # noqa: E731
            await self._call("read", key, download, self._downloads, self._large_s)
            if spool.size != size:
                found = f"chunk {index} has {spool.size} bytes instead of {size}"
                raise self._failed(OriginCorruptError, "read", key, found, "ask again, or another origin")
            return spool

        return await self._chunks.get(key, index, lambda: self._retry.run(fetch))

    async def _transact(self, call: Callable[[], Awaitable[T]]) -> T:
        """Send a transaction, again only if it lost against another one of the account before anything was sent."""
        return await self._retry.run(call, repeats=lambda error: bool(error.details.get("lost_transaction")))

    async def _call(
        self,
        did: str,
        key: str,
        call: Callable[[], T],
        threads: CallThreads,
        timeout_s: float,
        *,
        moved: Callable[[], int] | None = None,
        queue: bool = False,
    ) -> T:
        expect_own_process(self.url, self._pid)
        try:
            return await threads.run(call, timeout_s=timeout_s, moved=moved, queue=queue)
        except StalledError as error:
            if threads is self._writes or not self._writes.busy:
                await asyncio.to_thread(
                    self._sdk.close
                )  # ends the calls that wait for the node; the next one reconnects
            raise self._failed(OriginUnavailableError, did, key, str(error), "check the node, or try later") from None
        except OriginError as error:
            raise self._failed(type(error), did, key, error.message, "see docs/akave.md") from None
        except Exception as error:
            # From None: from the SDK's exception its configuration, with the private key, is reachable.
            raise translate(error, did, origin=self.url, key=key, secret=self._private_key.reveal()) from None

    def _failed(self, kind: type[OriginError], did: str, key: str, found: str, advice: str) -> OriginError:
        return origin_error(kind, did, found, advice, origin=self.url, key=key)


def _info(key: str, file: AkaveFile) -> ObjectInfo:
    cid = file.root_cid or None
    return ObjectInfo(key, file.size, etag=cid, modified_s=file.created_s or None, root_cid=cid)


def _report(loop: asyncio.AbstractEventLoop, on_bytes: OnBytes, count: int) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(on_bytes, count)
