"""Large objects in parts, resumable: what an upload that broke off has brought is not sent again.

The server keeps the parts of an upload that was never completed. The next upload under the same name looks for one
whose last part is of the bytes here, and takes a part as done if its size and its MD5 (S3's ETag of a part) are theirs.
One without such a part may be somebody's who writes something else under that name right now: its parts stay alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
PART_BYTES = 8 * MIB
SINGLE_BYTES = 2 * PART_BYTES
"""Up to here an object goes in one request."""
MAX_PARTS = 10_000
"""Of S3 (docs.aws.amazon.com, multipart upload limits)."""
PARTS_AT_ONCE = 4
_UPLOADS_LOOKED_AT = 4
_MD5 = re.compile(r"[0-9a-f]{32}")


def part_bytes(size: int) -> int:
    """The size of all parts but the last, from the object's size alone: so a later try cuts in the same places."""
    needed = -(-size // MAX_PARTS)
    return max(PART_BYTES, -(-needed // MIB) * MIB)


async def read_part(body: bytes | Path, start: int, end: int) -> bytes:
    """Bytes [start, end) of what is to be uploaded, or fewer where it ends. Raises OSError."""
    if isinstance(body, bytes):
        return body if end - start == len(body) else body[start:end]

    def read() -> bytes:
        with body.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    return await asyncio.to_thread(read)


@dataclass
class PartsUpload:
    """One object on its way. `run` it once."""

    calls: S3ApiClient
    retries: RetryLoop
    full: str
    """The object's name in the bucket."""
    key: str
    """The same, for messages."""
    body: bytes | Path
    size: int
    if_absent: bool
    metadata: Mapping[str, str]
    on_bytes: OnBytes | None
    _etags: dict[int, str] = field(default_factory=dict)

    async def run(self) -> str | None:
        """Send what is missing, then complete; the object's ETag. What was sent stays at the server if this fails."""
        found = await self._resumable()
        upload_id, there = found or (await self._begin(), {})
        numbers = iter(range(1, -(-self.size // part_bytes(self.size)) + 1))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(PARTS_AT_ONCE):
                    group.create_task(self._send(numbers, upload_id, there))
        except ExceptionGroup as failures:
            raise await self._ended_elsewhere(failures.exceptions[0]) from None
        return await self._complete(upload_id)

    async def _resumable(self) -> tuple[str, dict[int, tuple[int, str]]] | None:
        """An upload of this name and content that was begun, and its parts: size and ETag by number."""
        try:
            answer = await self._call("list_multipart_uploads", "look for uploads of", Prefix=self.full)
        except OriginDeniedError:
            return None  # may write, but not list
        except OriginError as error:
            if error.details["status"] not in ("405", "501"):
                raise
            return None
        begun = [one for one in answer.get("Uploads") or [] if one["Key"] == self.full]
        begun.sort(key=lambda one: str(one.get("Initiated", "")), reverse=True)
        best: tuple[str, dict[int, tuple[int, str]]] | None = None
        for one in begun[:_UPLOADS_LOOKED_AT]:
            with suppress(OriginNotFoundError):  # ended meanwhile
                parts = await self._parts(one["UploadId"])
                longer = len(parts) > (len(best[1]) if best else 0)
                if longer and await self._is_done(max(parts), parts):
                    best = one["UploadId"], parts
        return best

    async def _parts(self, upload_id: str) -> dict[int, tuple[int, str]]:
        parts: dict[int, tuple[int, str]] = {}
        more: dict[str, Any] = {}
        while True:
            answer = await self._call("list_parts", "look for parts of", Key=self.full, UploadId=upload_id, **more)
            for part in answer.get("Parts") or []:
                parts[part["PartNumber"]] = part["Size"], part["ETag"].strip('"')
            marker = answer.get("NextPartNumberMarker")
            if not answer.get("IsTruncated") or not marker or more.get("PartNumberMarker") == marker:
                return parts
            more = {"PartNumberMarker": marker}

    def _span(self, number: int) -> tuple[int, int]:
        """The bytes [start, end) of a part."""
        start = (number - 1) * part_bytes(self.size)
        return start, min(start + part_bytes(self.size), self.size)

    async def _is_done(self, number: int, there: Mapping[int, tuple[int, str]]) -> bool:
        """Whether a part that is there is of the bytes here."""
        start, end = self._span(number)
        size, etag = there[number]
        if size != end - start:
            return False
        return await asyncio.to_thread(_md5, await read_part(self.body, start, end)) == etag

    async def _begin(self) -> str:
        answer = await self._call(
            "create_multipart_upload", "begin to write", Key=self.full, Metadata=dict(self.metadata)
        )
        return str(answer["UploadId"])

    async def _send(self, numbers: Iterator[int], upload_id: str, there: Mapping[int, tuple[int, str]]) -> None:
        for number in numbers:
            start, end = self._span(number)
            data = await read_part(self.body, start, end)
            if len(data) != end - start:
                raise self._changed()
            size, etag = there.get(number, (-1, ""))
            if size == len(data) and await asyncio.to_thread(_md5, data) == etag:
                self._etags[number] = etag
            else:
                did = f"write bytes {start} to {end} of"
                answer = await self._call(
                    "upload_part", did, Key=self.full, UploadId=upload_id, PartNumber=number, Body=data
                )
                self._etags[number] = str(answer["ETag"]).strip('"')
            if self.on_bytes is not None:
                self.on_bytes(len(data))

    async def _complete(self, upload_id: str) -> str | None:
        parts = [{"PartNumber": number, "ETag": f'"{etag}"'} for number, etag in sorted(self._etags.items())]
        wanted: dict[str, Any] = {"Key": self.full, "UploadId": upload_id, "MultipartUpload": {"Parts": parts}}
        condition = {"IfNoneMatch": "*"} if self.if_absent else {}
        try:
            try:
                answer = await self._call("complete_multipart_upload", "complete", **wanted, **condition)
            except OriginError as error:
                if not condition or error.details["status"] != "501":
                    raise
                answer = await self._call("complete_multipart_upload", "complete", **wanted)
        except OriginNotFoundError as error:
            return await self._completed_before(error)
        except (OriginUnavailableError, OriginDeniedError):
            raise
        except OriginError:
            # It will not be accepted the next time either: out of the way with it.
            with suppress(OriginError):
                await self._call("abort_multipart_upload", "drop the parts of", Key=self.full, UploadId=upload_id)
            raise
        return str(answer.get("ETag", "")).strip('"') or None

    async def _completed_before(self, error: OriginError) -> str | None:
        """The ETag, where the upload is gone because it was completed: by a try whose answer was lost, or another."""
        try:
            found = await self._call("head_object", "ask for", Key=self.full)
        except OriginNotFoundError:
            raise await self._ended_elsewhere(error) from None
        etag = str(found.get("ETag", "")).strip('"')
        md5_of_md5s = all(_MD5.fullmatch(one) for one in self._etags.values()) and "-" in etag
        if found["ContentLength"] != self.size or (md5_of_md5s and etag != self._expected_etag()):
            raise self._another_first()
        return etag or None

    def _expected_etag(self) -> str:
        joined = b"".join(bytes.fromhex(self._etags[number]) for number in sorted(self._etags))
        return f"{_md5(joined)}-{len(self._etags)}"

    async def _call(self, method: str, did: str, **wanted: Any) -> dict[str, Any]:
        return await self.retries.run(lambda: self.calls.call(method, did, self.key, wanted))

    async def _ended_elsewhere(self, error: Exception) -> Exception:
        """What an error means, where it says that this upload is no more: another may have completed it."""
        if not isinstance(error, OriginNotFoundError) or "NoSuchUpload" not in error.message:
            return error
        if self.if_absent:
            with suppress(OriginNotFoundError):
                await self._call("head_object", "ask for", Key=self.full)
                return self._another_first()
        found, advice = "somebody ended this upload meanwhile", "try again"
        return origin_error(OriginUnavailableError, "write", found, advice, origin=self.calls.origin, key=self.key)

    def _another_first(self) -> OriginError:
        found, advice = "another object came first", "give this one another name, or delete that one"
        return origin_error(OriginExistsError, "write", found, advice, origin=self.calls.origin, key=self.key)

    def _changed(self) -> OriginError:
        found, advice = "the file became shorter meanwhile", "publish it when it is whole"
        return origin_error(OriginError, "read", found, advice, origin=self.calls.origin, key=self.key)


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
