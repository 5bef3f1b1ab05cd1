"""The origins of a node: its own, in their order, and those that manifests name; finds manifests at them."""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from node.origin.factory import open_store
from node.origin.layout import (
    MANIFESTS,
    MAX_MANIFEST_JSON,
    ManifestKey,
    decode_manifest,
    is_address,
    manifest_folder,
    parse_manifest_key,
    split_address,
)
from node.origin.location import OriginLocation, Traffic
from node.origin.policy import check_host, for_stranger, refusal
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import (
    InvalidManifestError,
    InvalidParamsError,
    OriginCorruptError,
    OriginDeniedError,
    OriginError,
    OriginNotFoundError,
    OriginUnavailableError,
    ShoalError,
)
from protocol.ids import ManifestDigest
from protocol.manifest import SignedManifest, split_name

log = logging.getLogger(__name__)

NEWEST_TRIED = 8
"""The most manifests of one name that are read, newest first, until one is valid."""
MAX_REMEMBERED = 256
"""Manifests whose origin is remembered."""
MAX_GUESTS = 64
"""Origins that are kept open besides the configured ones."""
_UNLISTED = ("https://", "http://")
"""HTTP has no listing: a manifest there is found by its URL only."""


@dataclass(frozen=True)
class OriginStats:
    """Traffic with all origins since the node started."""

    downloaded_bytes: int
    requests: int
    errors: int


class OriginRegistry:
    """Opened by `async with OriginRegistry.open(settings)`; opening sends nothing."""

    def __init__(self, settings: OriginSettings, trusted: Sequence[str]) -> None:
        self._settings = settings
        self._trusted = tuple(str(OriginUrl.parse(split_address(url)[0])) for url in trusted)
        self._traffic = Traffic()
        self._own: dict[str, OriginLocation] = {}
        self._guests: OrderedDict[str, OriginLocation] = OrderedDict()
        self._retired: list[OriginLocation] = []
        self._found_at: OrderedDict[ManifestDigest, str] = OrderedDict()
        self.urls: tuple[str, ...] = ()
        """The URLs of the configured origins, best first."""

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: OriginSettings, *, trusted: Sequence[str] = ()) -> AsyncIterator[OriginRegistry]:
        """`trusted` are URLs of manifests that the operator typed: their origins may be ones that no stranger may name.

        Raises InvalidParamsError for a URL that is not an origin's, OriginError for an origin that cannot be used.
        """
        origins = cls(settings, trusted)
        try:
            for url in settings.origins:
                known = str(OriginUrl.parse(url))
                origins._own[known] = origins._own.get(known) or origins._new(known)
                await origins._own[known].store()
            origins.urls = tuple(origins._own)
            yield origins
        finally:
            for location in (*origins._own.values(), *origins._guests.values(), *origins._retired):
                location.retire()
                await location.close()

    def stats(self) -> OriginStats:
        seen = self._traffic
        return OriginStats(seen.downloaded_bytes, seen.requests, seen.errors)

    def locations(self, signed: SignedManifest) -> tuple[OriginLocation, ...]:
        """The origins that may have a manifest's shards: the configured ones, the one it was read from, those it names.

        An origin that a manifest names and that no stranger may name is left out, and logged.
        """
        chosen = dict(self._own)
        if base := self._found_at.get(signed.digest):
            chosen.setdefault(base, self._at_url(base))
        for named in signed.origins:
            try:
                url = str(OriginUrl.parse(named))
            except InvalidParamsError as err:
                log.info("an origin of manifest %s is not asked: %s", signed.manifest.name, err)
                continue
            if url in chosen:
                continue
            if (why := refusal(url)) and not self._is_own(url):
                log.info("origin %s of manifest %s is not asked: %s", url, signed.manifest.name, why)
                continue
            chosen[url] = self._at_url(url)
        return tuple(chosen.values())

    async def find_manifests(self, kind: str | None, name: str) -> list[SignedManifest]:
        """The newest valid manifest of a name at each configured origin that has one; each digest once.

        `name` may be `name@digest`, with at least 8 digits, or a whole digest. An origin's error is logged; if none has
        the manifest, the first error is raised: OriginError or InvalidManifestError.
        """
        await self._tidy()
        plain, digest = split_name(name)
        answers = await asyncio.gather(
            *(self._find(location, kind, plain, digest) for location in self._own.values()), return_exceptions=True
        )
        found: dict[ManifestDigest, SignedManifest] = {}
        failures: list[ShoalError] = []
        for answer in answers:
            match answer:
                case ShoalError():
                    log.info("looking for manifest %r: %s", name, answer)
                    failures.append(answer)
                case BaseException():
                    raise answer
                case SignedManifest():
                    found.setdefault(answer.digest, answer)
        if failures and not found:
            raise failures[0]
        return list(found.values())

    async def manifest_at(self, url: str) -> SignedManifest:
        """The manifest at a URL, or the newest one in a folder, checked. `locations` returns its origin from then on.

        A URL that is neither under a configured origin nor trusted must be one that a stranger may name. Raises
        InvalidParamsError, InvalidManifestError, OriginError.
        """
        if not is_address(url) or "?" in url or "#" in url:
            raise InvalidParamsError(
                "a manifest's URL has a path, and neither a query nor a fragment: "
                "o3://bucket/prefix/manifests/NAME/, or one .json object in there"
            )
        base, key = split_address(url)
        base = str(OriginUrl.parse(base))
        if not key.endswith(".json") and not key.startswith(MANIFESTS):
            raise InvalidParamsError(
                f"{url} is neither a .json object nor a folder of manifests: o3://bucket/prefix/manifests/NAME/"
            )
        if (why := refusal(base)) and not self._is_own(base):
            raise OriginDeniedError(
                f"the manifest at {url} is not read: {why}; if you trust it, start the node with --manifest {url}",
                {"origin": base, "key": key, "status": "", "tried": 0},
            )
        await self._tidy()
        location = self._at_url(base)
        async with self._in_time(location, key, "a manifest"):
            signed = await self._at(location, key)
        self._found_at[signed.digest] = base
        while len(self._found_at) > MAX_REMEMBERED:
            self._found_at.popitem(last=False)
        return signed

    # Locations

    def _is_own(self, url: str) -> bool:
        return any(url == own or url.startswith(f"{own}/") for own in (*self._own, *self._trusted))

    def _at_url(self, url: str) -> OriginLocation:
        if url in self._own:
            return self._own[url]
        if url not in self._guests:
            self._guests[url] = self._new(url, guarded=not self._is_own(url))
            while len(self._guests) > MAX_GUESTS:
                _, oldest = self._guests.popitem(last=False)
                oldest.retire()
                self._retired.append(oldest)
        self._guests.move_to_end(url)
        return self._guests[url]

    def _new(self, url: str, *, guarded: bool = False) -> OriginLocation:
        settings = for_stranger(url, self._settings) if guarded else self._settings
        guard = partial(check_host, url) if guarded else None
        return OriginLocation(url, partial(open_store, url, settings), self._traffic, guard)

    async def _tidy(self) -> None:
        """Close the retired locations that are not read from any more."""
        idle = [location for location in self._retired if location.is_idle]
        self._retired = [location for location in self._retired if not location.is_idle]
        for location in idle:
            await location.close()

    # Manifests

    @asynccontextmanager
    async def _in_time(self, location: OriginLocation, key: str, what: str) -> AsyncIterator[None]:
        timeout_s = self._settings.find_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError:
            raise OriginUnavailableError(
                f"origin {location.url} did not answer within {timeout_s:g} s; it was asked for {what}",
                location.details(key),
            ) from None

    async def _find(self, location: OriginLocation, kind: str | None, plain: str, digest: str) -> SignedManifest | None:
        if location.url.startswith(_UNLISTED):
            return None
        async with self._in_time(location, manifest_folder(plain), f"manifest {plain!r}"):
            folder = MANIFESTS if digest and plain == digest else manifest_folder(plain)
            listed = await self._listed(location, folder, digest)
            return await self._newest(location, kind, None if plain == digest else plain, digest, listed)

    async def _at(self, location: OriginLocation, key: str) -> SignedManifest:
        if key.endswith(".json"):
            return await self._read(location, key)
        folder = f"{key.rstrip('/')}/"
        signed = await self._newest(location, None, None, "", await self._listed(location, folder))
        if signed is None:
            raise OriginNotFoundError(
                f"there is no valid manifest in {location.url}/{folder}; name one .json object, or publish there with "
                "--origin",
                location.details(folder),
            )
        return signed

    async def _listed(self, location: OriginLocation, folder: str, digest: str = "") -> list[ManifestKey]:
        """The newest manifests in a folder; with `digest`, those of that digest in any folder below it."""
        self._traffic.requests += 1
        keys: list[ManifestKey] = []
        try:
            async with location.in_use() as store:
                async for item in store.list(folder):
                    stamped = parse_manifest_key(item.key)
                    direct = "/" not in item.key[len(folder) :]
                    if stamped and stamped.digest.startswith(digest) and (direct or folder == MANIFESTS):
                        keys.append(stamped)
                    if len(keys) > 4 * NEWEST_TRIED:
                        keys = heapq.nlargest(NEWEST_TRIED, keys)
        except OriginError:
            self._traffic.errors += 1
            raise
        return heapq.nlargest(NEWEST_TRIED, keys)

    async def _newest(
        self, location: OriginLocation, kind: str | None, name: str | None, digest: str, listed: Sequence[ManifestKey]
    ) -> SignedManifest | None:
        failure: ShoalError | None = None
        for stamped in listed:
            try:
                signed = await self._read(location, stamped.key)
            except (InvalidManifestError, OriginNotFoundError, OriginCorruptError) as err:
                log.info("trying an older manifest: %s", err)
                failure = err
                continue
            manifest = signed.manifest
            if (kind is None or manifest.kind == kind) and name in (None, manifest.name):
                return signed
        if failure:
            raise failure
        return None

    async def _read(self, location: OriginLocation, key: str) -> SignedManifest:
        body = await location.read(key, MAX_MANIFEST_JSON)
        stamped = parse_manifest_key(key)
        try:
            signed = await asyncio.to_thread(decode_manifest, body)
            if stamped and signed.digest != stamped.digest:
                raise InvalidManifestError(f"its digest is {signed.digest}")
        except InvalidManifestError as err:
            raise InvalidManifestError(
                f"{key} at origin {location.url} is not a valid manifest: {err.message}"
            ) from None
        return signed
