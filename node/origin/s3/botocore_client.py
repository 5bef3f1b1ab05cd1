"""S3 through botocore, in threads: what obstore does not have or gets wrong, and all calls where it would hang.

It has no parts of uploads and no buckets, one odd key ends its listing, and it hangs in some forked processes. botocore
is imported at the first of these calls: the import is slow.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import ssl
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, Self, TypeVar

from node.origin.core.call_threads import CallThreads, StalledError
from node.origin.core.errors import unreachable_error
from node.origin.core.fork_guard import expect_own_process, no_fork
from node.origin.s3.access import S3Access
from node.origin.s3.errors import S3ErrorTranslator

T = TypeVar("T")

THREADS = 4
REQUESTS_AT_ONCE = 8
CONNECTIONS = 16
"""That are kept alive; a stream uses one as long as it lasts."""


class S3StoreCalls:
    """The calls of one store, through one client that is kept until `close`. Repeats no request; thread-safe."""

    def __init__(self, access: S3Access, failures: S3ErrorTranslator) -> None:
        self._access = access
        self._failures = failures
        self._threads = CallThreads(REQUESTS_AT_ONCE, name="s3")
        self._connecting = threading.Lock()
        self._client: Any = None
        self._process = os.getpid()

    async def answer(self, method: str, did: str, key: str, **params: Any) -> dict[str, Any]:
        """One call of S3's API; the answer as botocore gives it. Raises OriginError and its children."""
        return await self.run(partial(self.ask, method, did, key, params), did, key)

    async def run(self, call: Callable[[], T], did: str, key: str) -> T:
        """What `call` gives in a thread. Raises OriginUnavailableError if it takes too long, and what it raises."""
        expect_own_process(self._failures.origin, self._process)
        try:
            return await self._threads.run(call, timeout_s=self._access.timeout_s, queue=True)
        except StalledError as error:
            raise unreachable_error(did, str(error), origin=self._failures.origin, key=key) from None

    def ask(self, method: str, did: str, key: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """As `answer`. Blocks."""
        with self._connecting:
            if self._client is None:
                self._client = botocore_client(self._access, CONNECTIONS)
            client = self._client
        try:
            return dict(getattr(client, method)(Bucket=self._access.bucket, **params))
        except Exception as error:
            raise self._failures.of_botocore(error, did, key) from None

    def close(self) -> None:
        """Close the connections; the next call opens them again."""
        client, self._client = self._client, None
        if client is not None:
            client.close()


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
        self._client = await self._in_thread(partial(botocore_client, self._access, THREADS))
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
            answer = await self._in_thread(partial(getattr(self._client, method), **given))
        except Exception as error:
            raise self._failures.of_botocore(error, did, key) from None
        return dict(answer)

    async def _in_thread(self, call: partial[Any]) -> Any:
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
        from botocore.utils import parse_timestamp

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

    def moment(value: Any) -> datetime:
        # botocore's own way takes four fifths of the time of a listing.
        with suppress(TypeError, ValueError):
            if (found := datetime.fromisoformat(value)).tzinfo is not None:
                return found
        return parse_timestamp(value)  # type: ignore[no-any-return]  # of a header: an HTTP date

    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=moment)
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
        verify=_authorities(),
    )


def _authorities() -> str | None:
    """The certificates to trust, as obstore does: of SSL_CERT_FILE or SSL_CERT_DIR, else of this system.

    None: botocore's own, or those of AWS_CA_BUNDLE or REQUESTS_CA_BUNDLE.
    """
    found = ssl.get_default_verify_paths()
    for name, path in ((found.openssl_cafile_env, found.cafile), (found.openssl_capath_env, found.capath)):
        if path and os.environ.get(name):
            return path
    if os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE"):
        return None
    return found.cafile or found.capath
