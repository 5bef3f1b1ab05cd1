"""hf://: a repository of the Hugging Face Hub, or of a server that speaks its protocol, read only.

huggingface_hub says which files there are and how they are reached; their bytes come in ranges as from any web server.
A branch is looked up once a minute, so that reads that belong together are of one commit.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from node.clock import Clock
from node.origin.core.errors import listing_too_long_error, origin_error
from node.origin.core.fork_guard import expect_own_process
from node.origin.core.listing import readable_objects
from node.origin.core.retry import RetryLoop
from node.origin.http.ranges import HttpRangeReader
from node.origin.http.store import ReadOnlyStore
from node.origin.huggingface.errors import CREDENTIALS, LIBRARY, translated
from node.origin.interface import MAX_LISTED, ObjectInfo
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import OriginError, OriginNotFoundError, OriginUnavailableError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

PINNED_S = 60.0
"""For so long a branch means the commit that it meant; what is pushed in the meantime is seen after that."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubStore(ReadOnlyStore):
    """The files of the repository that the URL names, below its prefix."""

    def __init__(self, url: OriginUrl, settings: OriginSettings, clock: Clock | None = None) -> None:
        self.url = str(url)
        self._origin_url = url
        self._endpoint = settings.hf_endpoint.rstrip("/")
        self._token = settings.credentials.hf_token
        self._clock = clock or Clock()
        headers = {"Authorization": f"Bearer {self._token.reveal()}"} if self._token else {}
        self._ranges = HttpRangeReader(self.url, settings, headers, CREDENTIALS, clock=self._clock)
        self._retry = RetryLoop(settings.retry_total_s, clock=self._clock)
        self._timeout_s = settings.read_timeout_s
        self._process = os.getpid()
        self._commit: str | None = None
        self._pinned_until = 0.0
        self._pinning = asyncio.Lock()

    async def head(self, key: str) -> ObjectInfo:
        """See ObjectStore. The ETag is the file's hash: SHA-256 of a large file, git's of any other."""
        url = await self._address(key)

        def ask(api: HfApi) -> ObjectInfo:
            found = api.get_hf_file_metadata(url=url, timeout=self._timeout_s)
            if found.size is None:
                advice = "name another origin"
                raise origin_error(OriginError, "ask for", "it tells no size", advice, origin=self.url, key=key)
            return ObjectInfo(key, found.size, found.etag)

        return await self._ask("ask for", key, ask)

    async def get_range(self, key: str, start: int, end: int) -> bytes:
        """See ObjectStore."""
        return await self._ranges.read(await self._address(key), key, start, end)

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See ObjectStore."""
        return await self._ranges.read_many(await self._address(key), key, ranges)

    async def get_stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """See ObjectStore."""
        async with aclosing(self._ranges.stream(await self._address(key), key, start, end)) as parts:
            async for data in parts:
                yield data

    async def list(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See ObjectStore. huggingface_hub repeats a request of a listing up to five times; this store does not."""
        inside = f"{self._origin_url.prefix}/" if self._origin_url.prefix else ""
        folder = (inside + prefix).rpartition("/")[0]
        commit = await self._pinned()

        def ask(api: HfApi) -> list[ObjectInfo]:
            from huggingface_hub.hf_api import RepoFile

            entries = api.list_repo_tree(
                self._origin_url.container,
                folder or None,
                recursive=True,
                revision=commit,
                repo_type=self._origin_url.repo_type,
            )
            files = []
            for seen, entry in enumerate(entries):
                if seen == MAX_LISTED:
                    raise listing_too_long_error(prefix, origin=self.url)
                if isinstance(entry, RepoFile):
                    files.append(entry)
            infos = (ObjectInfo(one.path.removeprefix(inside), one.size, _hash(one)) for one in files)
            return [info for info in infos if info.key.startswith(prefix)]

        try:
            infos = await self._ask("list", prefix, ask, retried_by=LIBRARY)
        except OriginNotFoundError:
            if not folder:
                raise
            return  # the repository existed when it was pinned: it has no such folder
        for info in readable_objects(infos, self._origin_url, prefix):
            yield info

    async def close(self) -> None:
        """See ObjectStore."""
        await self._ranges.close()

    async def _address(self, key: str) -> str:
        from huggingface_hub import hf_hub_url

        url, full, commit = self._origin_url, self._origin_url.full_key(key), await self._pinned()
        return hf_hub_url(url.container, full, repo_type=url.repo_type, revision=commit, endpoint=self._endpoint)

    async def _pinned(self) -> str:
        async with self._pinning:
            if self._commit is None or self._clock.now() >= self._pinned_until:
                url = self._origin_url

                def ask(api: HfApi) -> str | None:
                    found = api.repo_info(
                        url.container, revision=url.revision, repo_type=url.repo_type, timeout=self._timeout_s
                    )
                    return str(found.sha) if found.sha else None

                try:
                    found = await self._ask("look up the commit of", url.revision or "", ask)
                except OriginUnavailableError:
                    if self._commit is None:
                        raise
                else:
                    self._commit = found or url.revision or "main"
                named = _COMMIT.fullmatch(url.revision or "")
                self._pinned_until = math.inf if named else self._clock.now() + PINNED_S
            return self._commit

    async def _ask(self, did: str, key: str, ask: Callable[[HfApi], T], *, retried_by: str = "") -> T:
        expect_own_process(self.url, self._process)

        def run() -> T:
            from huggingface_hub import HfApi

            # False: not the token of the user who is logged in on this machine, which this node was not given.
            token = self._token.reveal() if self._token else False
            try:
                return ask(HfApi(endpoint=self._endpoint, token=token, library_name="shoal"))
            except OriginError:
                raise
            except Exception as error:
                raise translated(error, did, origin=self.url, key=key, retried_by=retried_by) from None

        return await self._retry.run(lambda: asyncio.to_thread(run))


def _hash(file: Any) -> str:
    return str(file.lfs.sha256 if file.lfs else file.blob_id)
