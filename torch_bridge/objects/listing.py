"""The objects under a prefix, kept in metadata.json so that a start does not list the origin."""

from __future__ import annotations

import hashlib
import logging
import time
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from node.files import FileLock, atomic_write
from protocol.errors import OriginNotFoundError, OriginUnavailableError
from protocol.structs import prepared
from torch_bridge.core.store import Store

_log = logging.getLogger(__name__)


class ListedObject(msgspec.Struct, frozen=True, array_like=True):
    """One object, as it was listed."""

    key: str
    """Relative to the prefix."""
    size: int
    etag: str | None


class Listing(msgspec.Struct, frozen=True):
    """The content of metadata.json."""

    url: str
    listed_at_s: float
    """Seconds since 1970."""
    validator: str
    """SHA-256 over keys, sizes and etags: equal listings have equal ones."""
    objects: tuple[ListedObject, ...]

    def matching(self, pattern: str) -> tuple[ListedObject, ...]:
        """The objects whose key matches (fnmatch) and that have bytes. Raises OriginNotFoundError if none does."""
        found = tuple(one for one in self.objects if fnmatchcase(one.key, pattern) and one.size)
        if not found:
            raise OriginNotFoundError(
                f"no object matches {pattern!r} under {self.url}: {len(self.objects)} objects are there; check bucket, "
                "prefix and `match`, and that something was uploaded"
            )
        return found


def read_listing(store: Store, folder: Path, ttl_s: float) -> Listing:
    """The listing: from metadata.json if that is younger than `ttl_s`, else from the origin. One process lists, the
    others wait. If the origin does not answer, an older one is used, with a warning.

    Raises OriginUnavailableError if there is no older one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metadata.json"
    with FileLock(folder / "metadata.lock").held():
        kept = _read(path, store.url)
        if kept is not None and 0 <= time.time() - kept.listed_at_s < ttl_s:
            return kept
        try:
            objects = tuple(ListedObject(info.key, info.size, info.etag) for info in store.list())
        except OriginUnavailableError as error:
            if kept is None:
                raise
            age_s = time.time() - kept.listed_at_s
            _log.warning("%s; the listing of %.0f s ago in %s is used", error, age_s, path)
            return kept
        listing = Listing(store.url, time.time(), _validator(objects), objects)
        if kept is not None and kept.validator != listing.validator:
            _log.info("%s has changed: %d objects before, %d now", store.url, len(kept.objects), len(objects))
        _write(path, listing)
        return listing


def _validator(objects: tuple[ListedObject, ...]) -> str:
    return hashlib.sha256(msgspec.json.encode(objects)).hexdigest()


def _read(path: Path, url: str) -> Listing | None:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=prepared(Listing))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be read (%s): the origin is listed again", path, error)
        return None
    return found if found.url == url and found.validator == _validator(found.objects) else None


def _write(path: Path, listing: Listing) -> None:
    try:
        atomic_write(path, msgspec.json.encode(listing))
    except OSError as error:
        _log.warning("%s cannot be written (%s): the next start lists the origin again", path, error)
