"""From a URL to its store. Opening a store sends nothing: its first call does."""

from __future__ import annotations

import importlib.util

from node.clock import Clock
from node.origin.core.fork_guard import hangs_here, no_fork
from node.origin.interface import ObjectStore
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl


def open_store(url: str | OriginUrl, settings: OriginSettings, clock: Clock | None = None) -> ObjectStore:
    """The store of an origin; it encrypts if the settings name a key file. `clock` times its retries.

    Raises InvalidParamsError for a bad URL or key file, OriginError if a package that it needs is not installed.
    """
    origin = OriginUrl.parse(url) if isinstance(url, str) else url
    with no_fork():
        store = _open(origin, settings, clock)
    if settings.encryption_key_file is not None:
        from node.origin.encryption.keys import read_key_file
        from node.origin.encryption.store import EncryptedStore

        return EncryptedStore(store, read_key_file(settings.encryption_key_file))
    return store


def _open(url: OriginUrl, settings: OriginSettings, clock: Clock | None) -> ObjectStore:
    # Each back-end is imported when it is used: a node without an S3 origin does not load obstore, and so on.
    match url.scheme:
        case "akave":
            return _native(url, settings, clock)
        case "o3" if goes_native(url, settings):
            return _native(url, settings, clock)
        case "o3" | "s3":
            from node.origin.s3.forked import S3ForkedStore
            from node.origin.s3.store import S3Store

            return (S3ForkedStore if hangs_here("obstore") else S3Store)(url, settings, clock)
        case "https" | "http":
            from node.origin.http.store import HttpStore

            return HttpStore(url, settings, clock)
        case "hf":
            from node.origin.huggingface.store import HubStore

            return HubStore(url, settings, clock)
        case "file":
            from node.origin.local import FileStore

            return FileStore(url)


def _native(url: OriginUrl, settings: OriginSettings, clock: Clock | None) -> ObjectStore:
    from node.origin.akave.store import open_akave_store

    return open_akave_store(url, settings, clock)


def goes_native(url: OriginUrl, settings: OriginSettings) -> bool:
    """Whether a URL is reached through the akavesdk."""
    auto = settings.o3_backend == "auto" and _has_native(settings)
    return url.scheme == "akave" or (url.scheme == "o3" and (settings.o3_backend == "native" or auto))


def _has_native(settings: OriginSettings) -> bool:
    return bool(settings.credentials.akave_private_key) and importlib.util.find_spec("akavesdk") is not None
