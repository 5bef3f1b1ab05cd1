"""A repository of the Hugging Face Hub through huggingface_hub's own file system, in blocking calls.

`hf.HubStore` reads by our own ranges; here huggingface_hub makes the requests, and tries each again by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from node.origin.core.errors import corrupt_error
from node.origin.huggingface.errors import translated
from node.origin.interface import ObjectInfo
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import OriginError

T = TypeVar("T")


class HubFileSystem:
    """The files of one repository below a prefix, at a commit. Thread-safe; of the process that made it.

    Every method raises OriginError and the like.
    """

    def __init__(self, url: OriginUrl, settings: OriginSettings) -> None:
        from huggingface_hub import HfApi, HfFileSystem

        self._origin_url, self._url = url, str(url)
        # False: not the token of whoever is logged in on this machine, which nobody gave us.
        token: str | bool = settings.credentials.hf_token.reveal() if settings.credentials.hf_token else False
        endpoint = settings.hf_endpoint.rstrip("/")
        self._api = HfApi(endpoint=endpoint, token=token, library_name="shoal")
        # Out of fsspec's cache of file systems, which would keep the token, and hand this one to others.
        self._files = HfFileSystem(endpoint=endpoint, token=token, skip_instance_cache=True)
        self._looking = threading.Lock()

    def commit(self) -> str:
        """What the branch of the URL means now."""

        def ask() -> str:
            where = self._origin_url
            found = self._api.repo_info(where.container, revision=where.revision, repo_type=where.repo_type)
            return found.sha or where.revision or "main"

        return self._translated("look up the commit of", self._origin_url.revision or "", ask)

    def list(self, commit: str) -> list[ObjectInfo]:
        """All files. The ETag is the hash of the file: SHA-256 of large ones, git's of others."""
        root = self._path("", commit).rstrip("/")
        found = self._translated("list", "", lambda: self._files.find(root, detail=True, refresh=True))
        return [
            ObjectInfo(name.removeprefix(f"{root}/"), info["size"], _hash(info))
            for name, info in cast(dict[str, dict[str, Any]], found).items()
            if name.startswith(f"{root}/")
        ]

    def size(self, key: str, commit: str) -> int:
        """Bytes of a file. Its folder is listed, once."""

        def ask() -> int:
            with self._looking:
                return int(self._files.info(self._path(key, commit))["size"])

        return self._translated("ask for", key, ask)

    def read(self, key: str, commit: str, start: int, end: int) -> bytes:
        """Bytes [start, end), exactly as many. OriginCorruptError where others come, or where a range is ignored."""
        size = self.size(key, commit)  # by one thread alone: the next calls find the folder's listing

        def ask() -> bytes:
            # No cache and no reading ahead: one request for this range.
            path = self._path(key, commit)
            with self._files.open(path, "rb", block_size=end - start, cache_type="none", size=size) as file:
                file.seek(start)
                return bytes(file.read(end - start))

        data = self._translated("read", key, ask)
        if len(data) != end - start:
            found = f"{len(data)} bytes came"
            raise corrupt_error(f"read bytes {start} to {end} of", found, origin=self._url, key=key)
        return data

    def _path(self, key: str, commit: str) -> str:
        kind = "datasets/" if self._origin_url.repo_type == "dataset" else ""
        inside = self._origin_url.full_key(key) if key else self._origin_url.prefix
        return f"{kind}{self._origin_url.container}@{commit}/{inside}"

    def _translated(self, did: str, key: str, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except OriginError:
            raise
        except Exception as error:
            raise translated(error, did, origin=self._url, key=key) from None


def _hash(info: dict[str, Any]) -> str:
    lfs = info.get("lfs")
    return str(lfs["sha256"] if lfs else info.get("blob_id") or "")
