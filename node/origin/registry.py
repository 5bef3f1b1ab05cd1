"""The origins of a node: its own, in their order, and those that manifests name."""

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

FIND_TIMEOUT_S = 30.0
"""For one origin to say what a name or the URL of a manifest means."""
NEWEST_TRIED = 8
"""Manifests of one name that are read, newest first, until one is valid."""
MAX_REMEMBERED = 256
"""Manifests whose address is kept."""
MAX_GUESTS = 64
"""Places that are kept open besides the configured ones."""
_UNLISTED = ("https://", "http://")
"""HTTP has no listing: there a manifest is found by its URL alone."""


@dataclass(frozen=True)
class OriginStats:
    """Traffic with all origins since the start."""

    downloaded_bytes: int
    requests: int
    errors: int


class OriginRegistry:
    """Opened by `async with OriginRegistry.open(settings)`; no I/O until something is asked."""

    def __init__(self, settings: OriginSettings, trusted: Sequence[str]) -> None:
        self._settings = settings
        self._trusted = tuple(str(OriginUrl.parse(split_address(url)[0])) for url in trusted)
        self._traffic = Traffic()
        self._own: dict[str, OriginLocation] = {}
        self._guests: OrderedDict[str, OriginLocation] = OrderedDict()
        self._retired: list[OriginLocation] = []
        self._found_at: OrderedDict[ManifestDigest, str] = OrderedDict()
        self.urls: tuple[str, ...] = ()
        """The configured ones, best first."""

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: OriginSettings, *, trusted: Sequence[str] = ()) -> AsyncIterator[OriginRegistry]:
        """`trusted` are URLs of manifests that whoever runs this node typed: they may lie where no stranger's may.

        Raises InvalidParamsError for a URL that cannot be an origin's, OriginError for one that cannot be used.
        """
        origins = cls(settings, trusted)
        try:
            for url in settings.origins:
                known = str(OriginUrl.parse(url))
                origins._own[known] = origins._own.get(known) or origins._place(known)
                await origins._own[known].store()
            origins.urls = tuple(origins._own)
            yield origins
        finally:
            for place in (*origins._own.values(), *origins._guests.values(), *origins._retired):
                place.retire()
                await place.close()

    def stats(self) -> OriginStats:
        seen = self._traffic
        return OriginStats(seen.downloaded_bytes, seen.requests, seen.errors)

    def locations(self, signed: SignedManifest) -> tuple[OriginLocation, ...]:
        """Where shards of a manifest may lie: the configured origins, where it was read from, and those it names.

        What a manifest names is left out where no stranger may name it, with a line in the log.
        """
        chosen = dict(self._own)
        if base := self._found_at.get(signed.digest):
            chosen.setdefault(base, self._place_of(base))
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
            chosen[url] = self._place_of(url)
        return tuple(chosen.values())

    async def find_manifests(self, kind: str | None, name: str) -> list[SignedManifest]:
        """The newest valid manifest of a name at each configured origin that has one; each digest once.

        `name` may be `name@digest`, with at least 8 digits, or a whole digest. Raises OriginError or
        InvalidManifestError where an origin failed and no other has it; where another has, that is logged.
        """
        await self._tidy()
        plain, digest = split_name(name)
        answers = await asyncio.gather(
            *(self._find(place, kind, plain, digest) for place in self._own.values()), return_exceptions=True
        )
        found: dict[ManifestDigest, SignedManifest] = {}
        failures: list[ShoalError] = []
        for answer in answers:
            match answer:
                case ShoalError():
                    log.info("looking for %r: %s", name, answer)
                    failures.append(answer)
                case BaseException():
                    raise answer
                case SignedManifest():
                    found.setdefault(answer.digest, answer)
        if failures and not found:
            raise failures[0]
        return list(found.values())

    async def manifest_at(self, url: str) -> SignedManifest:
        """The manifest at a URL, or the newest in the folder there, checked. Its origin is a place of its shards.

        A URL that is neither under a configured origin nor trusted is held to what a stranger may name. Raises
        InvalidParamsError, InvalidManifestError, OriginError.
        """
        if not is_address(url) or "?" in url or "#" in url:
            raise InvalidParamsError(
                "a manifest's URL is scheme://place/path, without a query or fragment: "
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
        place = self._place_of(base)
        async with _in_time(place, key, "what manifest is there"):
            signed = await self._at(place, key)
        self._found_at[signed.digest] = base
        while len(self._found_at) > MAX_REMEMBERED:
            self._found_at.popitem(last=False)
        return signed

    # How places are kept

    def _is_own(self, url: str) -> bool:
        return any(url == own or url.startswith(f"{own}/") for own in (*self._own, *self._trusted))

    def _place_of(self, url: str) -> OriginLocation:
        if url in self._own:
            return self._own[url]
        if url not in self._guests:
            self._guests[url] = self._place(url, guarded=not self._is_own(url))
            while len(self._guests) > MAX_GUESTS:
                _, oldest = self._guests.popitem(last=False)
                oldest.retire()
                self._retired.append(oldest)
        self._guests.move_to_end(url)
        return self._guests[url]

    def _place(self, url: str, *, guarded: bool = False) -> OriginLocation:
        settings = for_stranger(url, self._settings) if guarded else self._settings
        guard = partial(check_host, url) if guarded else None
        return OriginLocation(url, partial(open_store, url, settings), self._traffic, guard)

    async def _tidy(self) -> None:
        """Close what was crowded out and is not read from any more."""
        idle = [place for place in self._retired if place.idle]
        self._retired = [place for place in self._retired if not place.idle]
        for place in idle:
            await place.close()

    # How manifests are found

    async def _find(self, place: OriginLocation, kind: str | None, plain: str, digest: str) -> SignedManifest | None:
        if place.url.startswith(_UNLISTED):
            return None
        async with _in_time(place, manifest_folder(plain), f"what {plain!r} is"):
            folder = MANIFESTS if digest and plain == digest else manifest_folder(plain)
            listed = await self._listed(place, folder, digest)
            return await self._newest(place, kind, None if plain == digest else plain, digest, listed)

    async def _at(self, place: OriginLocation, key: str) -> SignedManifest:
        if key.endswith(".json"):
            return await self._read(place, key)
        folder = f"{key.rstrip('/')}/"
        signed = await self._newest(place, None, None, "", await self._listed(place, folder))
        if signed is None:
            raise OriginNotFoundError(
                f"there is no valid manifest in {place.url}/{folder}; name one .json object, or publish there with "
                "--origin",
                place.details(folder),
            )
        return signed

    async def _listed(self, place: OriginLocation, folder: str, digest: str = "") -> list[ManifestKey]:
        """The newest manifests directly in a folder; with a digest that of any folder below it."""
        self._traffic.requests += 1
        keys: list[ManifestKey] = []
        try:
            async with place.in_use() as store:
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
        self, place: OriginLocation, kind: str | None, name: str | None, digest: str, listed: Sequence[ManifestKey]
    ) -> SignedManifest | None:
        failure: ShoalError | None = None
        for stamped in listed:
            try:
                signed = await self._read(place, stamped.key)
            except (InvalidManifestError, OriginNotFoundError, OriginCorruptError) as err:
                log.info("an older manifest is looked for: %s", err)
                failure = err
                continue
            manifest = signed.manifest
            if (kind is None or manifest.kind == kind) and name in (None, manifest.name):
                return signed
        if failure:
            raise failure
        return None

    async def _read(self, place: OriginLocation, key: str) -> SignedManifest:
        body = await place.read(key, MAX_MANIFEST_JSON)
        stamped = parse_manifest_key(key)
        try:
            signed = await asyncio.to_thread(decode_manifest, body)
            if stamped and signed.digest != stamped.digest:
                raise InvalidManifestError(f"its digest is {signed.digest}")
        except InvalidManifestError as err:
            raise InvalidManifestError(f"{key} at origin {place.url} is no valid manifest: {err.message}") from None
        return signed


@asynccontextmanager
async def _in_time(place: OriginLocation, key: str, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(FIND_TIMEOUT_S):
            yield
    except TimeoutError:
        raise OriginUnavailableError(
            f"origin {place.url} did not say within {FIND_TIMEOUT_S:g} s {what}", place.details(key)
        ) from None
