"""From a URL to its store. Nothing is reached before the first call of a method."""

from __future__ import annotations

import importlib.util

from node.origin.core.fork_guard import hangs_here, no_fork
from node.origin.interface import ObjectStore
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl


def open_store(url: str | OriginUrl, settings: OriginSettings) -> ObjectStore:
    """The store of an origin, encrypted where the settings name a key.

    Raises InvalidParamsError where the URL or the key is none, OriginError where a part that it needs is not installed.
    """
    where = OriginUrl.parse(url) if isinstance(url, str) else url
    with no_fork():
        store = _open(where, settings)
    if settings.encryption_key_file is not None:
        from node.origin.encryption.keys import read_key_file
        from node.origin.encryption.store import EncryptedStore

        return EncryptedStore(store, read_key_file(settings.encryption_key_file))
    return store


def _open(url: OriginUrl, settings: OriginSettings) -> ObjectStore:
    # Imported where they are needed: a node without an S3 origin does not pay for obstore, and so on.
    match url.scheme:
        case "akave":
            return _native(url, settings)
        case "o3" if goes_native(url, settings):
            return _native(url, settings)
        case "o3" | "s3":
            from node.origin.s3.forked import S3ForkedStore
            from node.origin.s3.store import S3Store

            return (S3ForkedStore if hangs_here("obstore") else S3Store)(url, settings)
        case "https" | "http":
            from node.origin.http.store import HttpStore

            return HttpStore(url, settings)
        case "hf":
            from node.origin.huggingface.store import HubStore

            return HubStore(url, settings)
        case "file":
            from node.origin.local import FileStore

            return FileStore(url)


def _native(url: OriginUrl, settings: OriginSettings) -> ObjectStore:
    from node.origin.akave.store import open_akave_store

    return open_akave_store(url, settings)


def goes_native(url: OriginUrl, settings: OriginSettings) -> bool:
    """Whether a URL is reached by the akavesdk."""
    auto = settings.o3_backend == "auto" and _has_native(settings)
    return url.scheme == "akave" or (url.scheme == "o3" and (settings.o3_backend == "native" or auto))


def _has_native(settings: OriginSettings) -> bool:
    return bool(settings.credentials.akave_private_key) and importlib.util.find_spec("akavesdk") is not None
