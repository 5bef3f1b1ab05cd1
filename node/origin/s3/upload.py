"""Large objects in parts, resumable: parts that the server has from an upload that broke off are not sent again.

The server keeps the parts of an upload that was never completed. The next upload of the same key looks for one whose
last part is of the bytes here, and takes a part as sent if its size and its MD5 (S3's ETag of a part) are right. An
upload without such a part may be that of a process that writes something else under that key now: it is left alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from node.background import FirstErrorGroup
from node.origin.core.errors import origin_error
from node.origin.core.retry import RetryLoop
from node.origin.interface import OnBytes
from node.origin.s3.botocore_client import S3ApiClient
from protocol.errors import (
    OriginDeniedError,
    OriginError,
    OriginExistsError,
    OriginNotFoundError,
    OriginUnavailableError,
)

MIB = 1 << 20
MAX_PARTS = 10_000
"""Of S3 (docs.aws.amazon.com, multipart upload limits)."""
PARTS_AT_ONCE = 4
_UPLOADS_LOOKED_AT = 4
_MD5 = re.compile(r"[0-9a-f]{32}")


def part_size(size: int, least: int) -> int:
    """Bytes of every part but the last, from the object's size and the least part alone: a later try cuts the same."""
    needed = -(-size // MAX_PARTS)
    return max(least, -(-needed // MIB) * MIB)


async def read_part(body: bytes | Path, start: int, end: int) -> bytes:
    """The bytes [start, end) of a body, or fewer at its end. Raises OSError."""
    if isinstance(body, bytes):
        return body if end - start == len(body) else body[start:end]

    def read() -> bytes:
        with body.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    return await asyncio.to_thread(read)


@dataclass(frozen=True)
class ObjectUpload:
    """What is to be uploaded."""

    full_key: str
    """The object's key in the bucket."""
    key: str
    """The key relative to the store, for messages."""
    body: bytes | Path
    size: int
    """Bytes."""
    least_part_bytes: int
    if_absent: bool
    metadata: Mapping[str, str]
    on_bytes: OnBytes | None


class PartsUpload:
    """One upload in parts. `run` it once."""

    def __init__(self, client: S3ApiClient, retry: RetryLoop, upload: ObjectUpload) -> None:
        self._client, self._retry, self._upload = client, retry, upload
        self._part_bytes = part_size(upload.size, upload.least_part_bytes)
        self._etags: dict[int, str] = {}

    async def run(self) -> str | None:
        """Send what the server lacks, then complete; returns the object's ETag.

        If it fails, the server keeps the parts that were sent. Raises OriginError and its children, OSError if the body
        cannot be read.
        """
        found = await self._resumable()
        upload_id, sent = found or (await self._begin(), {})
        numbers = iter(range(1, -(-self._upload.size // self._part_bytes) + 1))
        try:
            async with FirstErrorGroup() as group:
                for _ in range(PARTS_AT_ONCE):
                    group.create_task(self._send(numbers, upload_id, sent))
        except Exception as error:
            raise await self._ended_elsewhere(error) from None
        return await self._complete(upload_id)

    async def _resumable(self) -> tuple[str, dict[int, tuple[int, str]]] | None:
        """An upload of this key and content that was begun, and its parts: size and ETag by number."""
        try:
            answer = await self._call("list_multipart_uploads", "look for uploads of", Prefix=self._upload.full_key)
        except OriginDeniedError:
            return None  # these keys may write, and not list
        except OriginError as error:
            if error.details["status"] not in ("405", "501"):
                raise
            return None
        begun = [one for one in answer.get("Uploads") or [] if one["Key"] == self._upload.full_key]
        begun.sort(key=lambda one: str(one.get("Initiated", "")), reverse=True)
        best: tuple[str, dict[int, tuple[int, str]]] | None = None
        for one in begun[:_UPLOADS_LOOKED_AT]:
            with suppress(OriginNotFoundError):  # ended in the meantime
                parts = await self._parts(one["UploadId"])
                longer = len(parts) > (len(best[1]) if best else 0)
                if longer and await self._is_done(max(parts), parts):
                    best = one["UploadId"], parts
        return best

    async def _parts(self, upload_id: str) -> dict[int, tuple[int, str]]:
        parts: dict[int, tuple[int, str]] = {}
        more: dict[str, Any] = {}
        while True:
            answer = await self._call(
                "list_parts", "look for parts of", Key=self._upload.full_key, UploadId=upload_id, **more
            )
            for part in answer.get("Parts") or []:
                parts[part["PartNumber"]] = part["Size"], part["ETag"].strip('"')
            marker = answer.get("NextPartNumberMarker")
            if not answer.get("IsTruncated") or not marker or more.get("PartNumberMarker") == marker:
                return parts
            more = {"PartNumberMarker": marker}

    def _span(self, number: int) -> tuple[int, int]:
        """The bytes [start, end) of a part."""
        start = (number - 1) * self._part_bytes
        return start, min(start + self._part_bytes, self._upload.size)

    async def _is_done(self, number: int, sent: Mapping[int, tuple[int, str]]) -> bool:
        """Whether a part that the server has is of the bytes here."""
        start, end = self._span(number)
        size, etag = sent[number]
        if size != end - start:
            return False
        return await asyncio.to_thread(_md5, await read_part(self._upload.body, start, end)) == etag

    async def _begin(self) -> str:
        answer = await self._call(
            "create_multipart_upload", "begin to write", Key=self._upload.full_key, Metadata=dict(self._upload.metadata)
        )
        return str(answer["UploadId"])

    async def _send(self, numbers: Iterator[int], upload_id: str, sent: Mapping[int, tuple[int, str]]) -> None:
        for number in numbers:
            start, end = self._span(number)
            data = await read_part(self._upload.body, start, end)
            if len(data) != end - start:
                raise self._changed()
            size, etag = sent.get(number, (-1, ""))
            if size == len(data) and await asyncio.to_thread(_md5, data) == etag:
                self._etags[number] = etag
            else:
                did = f"write bytes {start} to {end} of"
                answer = await self._call(
                    "upload_part", did, Key=self._upload.full_key, UploadId=upload_id, PartNumber=number, Body=data
                )
                self._etags[number] = str(answer["ETag"]).strip('"')
            if self._upload.on_bytes is not None:
                self._upload.on_bytes(len(data))

    async def _complete(self, upload_id: str) -> str | None:
        parts = [{"PartNumber": number, "ETag": f'"{etag}"'} for number, etag in sorted(self._etags.items())]
        params: dict[str, Any] = {
            "Key": self._upload.full_key,
            "UploadId": upload_id,
            "MultipartUpload": {"Parts": parts},
        }
        condition = {"IfNoneMatch": "*"} if self._upload.if_absent else {}
        try:
            try:
                answer = await self._call("complete_multipart_upload", "complete", **params, **condition)
            except OriginError as error:
                if not condition or error.details["status"] != "501":
                    raise
                answer = await self._call("complete_multipart_upload", "complete", **params)
        except OriginNotFoundError as error:
            return await self._completed_before(error)
        except (OriginUnavailableError, OriginDeniedError):
            raise
        except OriginError:
            # The server will not accept it the next time either.
            with suppress(OriginError):
                await self._call(
                    "abort_multipart_upload", "drop the parts of", Key=self._upload.full_key, UploadId=upload_id
                )
            raise
        return str(answer.get("ETag", "")).strip('"') or None

    async def _completed_before(self, error: OriginError) -> str | None:
        """The ETag, if the upload is gone because it was completed: by a try whose answer was lost, or by another."""
        try:
            found = await self._call("head_object", "ask for", Key=self._upload.full_key)
        except OriginNotFoundError:
            raise await self._ended_elsewhere(error) from None
        etag = str(found.get("ETag", "")).strip('"')
        md5_of_md5s = all(_MD5.fullmatch(one) for one in self._etags.values()) and "-" in etag
        if found["ContentLength"] != self._upload.size or (md5_of_md5s and etag != self._expected_etag()):
            raise self._another_first()
        return etag or None

    def _expected_etag(self) -> str:
        joined = b"".join(bytes.fromhex(self._etags[number]) for number in sorted(self._etags))
        return f"{_md5(joined)}-{len(self._etags)}"

    async def _call(self, method: str, did: str, **params: Any) -> dict[str, Any]:
        return await self._retry.run(lambda: self._client.call(method, did, self._upload.key, params))

    async def _ended_elsewhere(self, error: Exception) -> Exception:
        """What an error means that says that this upload is gone: another writer may have completed it."""
        if not isinstance(error, OriginNotFoundError) or "NoSuchUpload" not in error.message:
            return error
        if self._upload.if_absent:
            with suppress(OriginNotFoundError):
                await self._call("head_object", "ask for", Key=self._upload.full_key)
                return self._another_first()
        found, advice = "another writer ended this upload in the meantime", "try again"
        return origin_error(
            OriginUnavailableError, "write", found, advice, origin=self._client.origin, key=self._upload.key
        )

    def _another_first(self) -> OriginError:
        found, advice = "another writer was first", "give this one another name, or delete that one"
        return origin_error(OriginExistsError, "write", found, advice, origin=self._client.origin, key=self._upload.key)

    def _changed(self) -> OriginError:
        found, advice = "the file became shorter in the meantime", "publish it when it is whole"
        return origin_error(OriginError, "read", found, advice, origin=self._client.origin, key=self._upload.key)


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
