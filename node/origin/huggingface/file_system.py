"""A repository of the Hugging Face Hub through huggingface_hub's own file system, in blocking calls.

HubStore reads the same files through our own HTTP requests; here huggingface_hub makes them. It repeats the requests of
a listing by itself and not those of a range, which the caller repeats.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from node.origin.core.errors import corrupt_error
from node.origin.core.listing import readable_objects
from node.origin.huggingface.errors import LIBRARY, translated
from node.origin.interface import ObjectInfo
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import OriginError

T = TypeVar("T")


class HubFileSystem:
    """The files of one repository below a prefix, at a commit. Thread-safe; for the process that made it.

    Every method raises OriginError and its children.
    """

    def __init__(self, url: OriginUrl, settings: OriginSettings) -> None:
        from huggingface_hub import HfApi, HfFileSystem

        self._origin_url, self._url = url, str(url)
        # False: not the token of the user who is logged in on this machine, which this node was not given.
        token: str | bool = settings.credentials.hf_token.reveal() if settings.credentials.hf_token else False
        endpoint = settings.hf_endpoint.rstrip("/")
        self._token = token
        self._api = HfApi(endpoint=endpoint, token=token, library_name="shoal")
        # Outside of fsspec's cache of file systems, which would keep the token and give this one to others.
        self._files = HfFileSystem(endpoint=endpoint, token=token, skip_instance_cache=True)
        self._listing = threading.Lock()

    def commit(self) -> str:
        """The commit that the branch of the URL means now."""

        def ask() -> str:
            url = self._origin_url
            found = self._api.repo_info(url.container, revision=url.revision, repo_type=url.repo_type)
            return found.sha or url.revision or "main"

        return self._translated("look up the commit of", self._origin_url.revision or "", ask)

    def list(self, commit: str) -> list[ObjectInfo]:
        """All files. The ETag is the file's hash: SHA-256 of a large file, git's of any other."""
        root = self._path("", commit).rstrip("/")
        ask = lambda: self._files.find(root, detail=True, refresh=True)  # noqa: E731
        found = self._translated("list", "", ask, retried_by=LIBRARY)
        infos = (
            ObjectInfo(name.removeprefix(f"{root}/"), info["size"], _hash(info))
            for name, info in cast(dict[str, dict[str, Any]], found).items()
            if name.startswith(f"{root}/")
        )
        return readable_objects(infos, self._origin_url, "")

    def size(self, key: str, commit: str) -> int:
        """Bytes of a file. The first call lists its folder."""

        def ask() -> int:
            with self._listing:
                return int(self._files.info(self._path(key, commit))["size"])

        return self._translated("ask for", key, ask, retried_by=LIBRARY)

    def read(self, key: str, commit: str, start: int, end: int) -> bytes:
        """Exactly the bytes [start, end), by one request.

        Raises OriginCorruptError if another number of bytes comes, or if the server ignores the range.
        """
        size = self.size(key, commit)  # one thread lists the folder; the others find the listing

        def ask() -> bytes:
            # No cache and no read-ahead: one request for this range.
            span = end - start
            path = self._path(key, commit)
            with _range_file_class()(
                self._files, path, token=self._token, mode="rb", block_size=span, cache_type="none", size=size
            ) as file:
                file.seek(start)
                return bytes(file.read(span))

        data = self._translated("read", key, ask)
        if len(data) != end - start:
            found = f"{len(data)} bytes came"
            raise corrupt_error(f"read bytes {start} to {end} of", found, origin=self._url, key=key)
        return data

    def _path(self, key: str, commit: str) -> str:
        kind = "datasets/" if self._origin_url.repo_type == "dataset" else ""
        inside = self._origin_url.full_key(key) if key else self._origin_url.prefix
        return f"{kind}{self._origin_url.container}@{commit}/{inside}"

    def _translated(self, did: str, key: str, ask: Callable[[], T], *, retried_by: str = "") -> T:
        try:
            return ask()
        except OriginError:
            raise
        except Exception as error:
            raise translated(error, did, origin=self._url, key=key, retried_by=retried_by) from None


@functools.cache
def _range_file_class() -> type[Any]:
    """huggingface_hub's file, but for the five retries of its own that it makes for each range."""
    import huggingface_hub.utils
    from huggingface_hub import constants
    from huggingface_hub.hf_file_system import HfFileSystemFile

    hub: Any = huggingface_hub.utils  # what it exports is not declared

    class RangeFile(HfFileSystemFile):  # type: ignore[misc,unused-ignore]
        def __init__(self, *args: Any, token: str | bool, **options: Any) -> None:
            self._token = token
            super().__init__(*args, **options)

        def _fetch_range(self, start: int, end: int) -> bytes:
            headers = {"range": f"bytes={start}-{end - 1}", **hub.build_hf_headers(token=self._token)}
            timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
            answer = hub.http_backoff("GET", self.url(), headers=headers, timeout=timeout_s, max_retries=0)
            hub.hf_raise_for_status(answer)
            return bytes(answer.content)

    return RangeFile


def _hash(info: dict[str, Any]) -> str:
    lfs = info.get("lfs")
    return str(lfs["sha256"] if lfs else info.get("blob_id") or "")
