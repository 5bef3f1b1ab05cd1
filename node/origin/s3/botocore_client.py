"""The calls of S3 that obstore does not have, for uploads in parts and for buckets: botocore, in threads of its own.

botocore is imported at the first of these calls: the import is slow, and most nodes only read.
"""

from __future__ import annotations

import asyncio
import functools
import io
import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from node.origin.core.fork_guard import no_fork
from node.origin.s3.access import S3Access
from node.origin.s3.errors import S3ErrorTranslator

THREADS = 4


class S3ApiClient:
    """A client of one bucket, opened by `async with` for the length of an upload. Repeats no request."""

    def __init__(self, access: S3Access, failures: S3ErrorTranslator) -> None:
        self.origin = failures.origin
        self._access = access
        self._failures = failures
        self._stopped = threading.Event()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="upload")
        self._client: Any = None

    async def __aenter__(self) -> Self:
        self._client = await self._in_thread(functools.partial(botocore_client, self._access, THREADS))
        return self

    async def __aexit__(self, *_: object) -> None:
        # A thread cannot be cancelled, but its request can: it breaks off at the next read of its body.
        self._stopped.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._client.close)

    async def call(
        self, method: str, did: str, key: str, params: Mapping[str, Any], *, in_bucket: bool = True
    ) -> dict[str, Any]:
        """One call of S3's API; the answer as botocore gives it. Raises OriginError and its children."""
        given = {"Bucket": self._access.bucket, **params} if in_bucket else dict(params)
        if "Body" in given:
            given["Body"] = _StoppableBody(given["Body"], self._stopped)
        try:
            answer = await self._in_thread(functools.partial(getattr(self._client, method), **given))
        except Exception as error:
            raise self._failures.of_botocore(error, did, key) from None
        return dict(answer)

    async def _in_thread(self, call: functools.partial[Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


class _StoppableBody(io.BytesIO):
    """A body whose sending can be stopped."""

    def __init__(self, data: bytes, stopped: threading.Event) -> None:
        super().__init__(data)
        self._stopped = stopped

    def read(self, size: int | None = -1, /) -> bytes:
        if self._stopped.is_set():
            raise ConnectionAbortedError("the upload was given up")
        return super().read(size)


def botocore_client(access: S3Access, connections: int) -> Any:
    """A client that signs with these keys and keeps so many connections alive. It takes 0.4 s to make: one a store."""
    with no_fork():
        import botocore
        import botocore.session
        from botocore.config import Config

    if (log := logging.getLogger("botocore")).level == logging.NOTSET:
        log.setLevel(logging.INFO)  # at DEBUG it writes down signatures and headers
    # No profile and no file of the user's home directory: only our settings count.
    session = botocore.session.Session(
        {
            "profile": (None, None, None, None),
            "config_file": (None, None, os.devnull, None),
            "credentials_file": (None, None, os.devnull, None),
        }
    )
    return session.create_client(
        "s3",
        region_name=access.region,
        endpoint_url=access.endpoint,
        aws_access_key_id=access.access_key.reveal() if access.access_key else None,
        aws_secret_access_key=access.secret_key.reveal() if access.secret_key else None,
        aws_session_token=access.session_token.reveal() if access.session_token else None,
        config=Config(
            signature_version="s3v4" if access.signs else botocore.UNSIGNED,
            s3={"addressing_style": "path", "payload_signing_enabled": True},
            # O3 refuses checksum headers; the signature covers the body's SHA-256.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"total_max_attempts": 1, "mode": "standard"},
            connect_timeout=access.connect_timeout_s,
            read_timeout=access.read_timeout_s,
            max_pool_connections=connections,
            user_agent="shoal",
        ),
    )
