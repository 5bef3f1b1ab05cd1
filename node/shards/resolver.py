"""What a name, a digest, or a description of a shard means: here first, then in the cluster, then at the origins."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from node.shards.interfaces import Discovery, FetchManifest, FoundProvider, Origin
from node.shards.settings import ShardsSettings
from node.shards.store.catalog import Catalog
from protocol.commands.common import ShardSelector
from protocol.errors import (
    AmbiguousNameError,
    InvalidParamsError,
    NoSourceError,
    ShardNotFoundError,
    ShoalError,
    UnknownNameError,
)
from protocol.ids import ManifestDigest
from protocol.manifest import ShardEntry, SignedManifest, split_name

log = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
FETCHED_MANIFESTS = 64
"""Kept in memory, of which this node holds no shard."""
SEARCHED_MANIFESTS = 100
"""Of the cluster, at most, for a shard of which only the file name or the content is known."""
SHOWN_NAMES = 20


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A manifest that a name may mean."""

    name: str
    kind: str
    digest: ManifestDigest

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:12]}"


class Names:
    """Resolves names against the catalog, discovery and origins."""

    def __init__(
        self,
        settings: ShardsSettings,
        catalog: Catalog,
        discovery: Discovery,
        fetch_manifest: FetchManifest,
        origin: Origin | None = None,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._discovery = discovery
        self._fetch_manifest = fetch_manifest
        self._origin = origin
        self._fetched: OrderedDict[ManifestDigest, SignedManifest] = OrderedDict()

    async def resolve(self, kind: Kind | None, name: str | None) -> SignedManifest:
        """The manifest of `name`, `name@digest`, a digest or a manifest's URL; without a name, of the only model of the
        cluster.

        Raises UnknownNameError, AmbiguousNameError, NoSourceError where nobody gives the manifest out, and, of a URL,
        what the origin raises.
        """
        if name is None:
            return await self._only(kind or "model")
        if "://" in name:
            return await self._at(kind, name)
        plain, digest = split_name(name)
        failures: list[str] = []
        chosen = await self._find(kind, plain, digest) or await self._find_at_origins(kind, name, failures)
        if not chosen:
            chosen = await self._insist(lambda: self._find(kind, plain, digest))
        if not chosen:
            known = ", ".join(await self._known(kind)) or "none"
            where = "here, in the cluster or at its origins" if self._origin else "here or in the cluster"
            raise UnknownNameError(
                f"no {kind or 'model, data set or file'} {name!r} is known {where}; known are: {known}"
                + "".join(f"; {failure}" for failure in failures),
                {"name": name},
            )
        digest = _the_one(chosen, f"{name!r} is the name of")
        return await self.manifest(ManifestDigest(digest), plain)

    async def _at(self, kind: Kind | None, url: str) -> SignedManifest:
        if self._origin is None:
            raise InvalidParamsError(f"{url!r} is the URL of a manifest, and this node has no origins")
        signed = await self._origin.manifest_at(url)
        found = signed.manifest.kind
        if kind is not None and found != kind:
            raise InvalidParamsError(f"at {url} is the {found} {signed.manifest.name}, no {kind}: ask for a {found}")
        return self._remember(signed)

    async def _find_at_origins(self, kind: Kind | None, name: str, failures: list[str]) -> set[Candidate]:
        """What the name means at the origins; why nothing could be learnt there goes to `failures`."""
        if self._origin is None:
            return set()
        try:
            found = await self._origin.find_manifests(kind, name)
        except ShoalError as err:
            failures.append(err.message)
            return set()
        return {_candidate(self._remember(signed)) for signed in found}

    def _remember(self, signed: SignedManifest) -> SignedManifest:
        """Keep a manifest that came from elsewhere, so that its digest finds it; the one held here, where one is."""
        held = self._catalog.manifest(signed.digest)
        if held:
            return held
        self._fetched[signed.digest] = signed
        self._fetched.move_to_end(signed.digest)
        while len(self._fetched) > FETCHED_MANIFESTS:
            self._fetched.popitem(last=False)
        return signed

    async def _only(self, kind: Kind) -> SignedManifest:
        chosen = await self._insist(lambda: self._all(kind))
        if not chosen:
            raise UnknownNameError(f"the cluster has no {kind} yet: publish one, or wait for its node to be found")
        return await self.manifest(_the_one(chosen, f"name the {kind}: the cluster has"))

    async def _all(self, kind: Kind) -> set[Candidate]:
        found = {Candidate(item.name, item.kind, item.digest) for item in await self._discovery.list_names()}
        found |= {_candidate(signed) for signed in self._catalog.manifests()}
        return {candidate for candidate in found if candidate.kind == kind}

    def _here(self, kind: Kind | None, plain: str, digest: str) -> set[Candidate]:
        held = [_candidate(signed) for signed in self._catalog.manifests()]
        fetched = [_candidate(signed) for signed in self._fetched.values()] if digest else []
        return _fitting(held, kind, plain, digest) or _fitting(fetched, kind, plain, digest)

    async def _find(self, kind: Kind | None, plain: str, digest: str) -> set[Candidate]:
        if here := self._here(kind, plain, digest):
            return here
        named = [*await self._discovery.find_name(plain)]
        if digest and digest != plain:  # or the name itself ends like this
            named += await self._discovery.find_name(f"{plain}@{digest}")
        chosen = _fitting([Candidate(item.name, item.kind, item.digest) for item in named], kind, plain, digest)
        if not chosen and len(digest) == 64 and await self._discovery.find_providers(ManifestDigest(digest)):
            return {Candidate(plain, kind or "manifest", ManifestDigest(digest))}
        return chosen

    async def _insist(self, look: Callable[[], Awaitable[set[Candidate]]]) -> set[Candidate]:
        """Look again for a while: an announcement may be on its way, or a file not yet looked at."""
        loop, pause_s = asyncio.get_running_loop(), 0.1
        give_up = loop.time() + self._settings.name_timeout_s
        while not (found := await look()) and (left_s := give_up - loop.time()) > 0:
            await asyncio.sleep(min(pause_s, left_s))
            pause_s *= 2
        return found

    async def _known(self, kind: Kind | None) -> list[str]:
        found = await self._all("model") if kind != "dataset" else set()
        if kind != "model":
            found |= await self._all("dataset")
        return [str(candidate) for candidate in sorted(found)[:SHOWN_NAMES]]

    async def manifest(
        self, digest: ManifestDigest, name: str | None = None, *, ask_origins: bool = True
    ) -> SignedManifest:
        """The manifest with this digest, from here, a provider or an origin; its name, where known, helps to find it.

        Raises NoSourceError where nobody gives it out.
        """
        held = self._catalog.manifest(digest)
        if held:
            return held
        if digest in self._fetched:
            return self._remember(self._fetched[digest])
        failures: list[str] = []
        for provider in await self._providers(digest):
            try:
                return self._remember(await self._fetch_manifest(provider, digest))
            except ShoalError as err:
                failures.append(f"{provider.host}:{provider.rpc_port}: {err.message}")
        # A record outlives its node for a while, and then the name is known and nobody there to ask.
        wanted = digest if name in (None, digest) else f"{name}@{digest}"
        if ask_origins:
            await self._find_at_origins(None, wanted, failures)
        if digest in self._fetched:
            return self._fetched[digest]
        raise NoSourceError(
            f"nobody gives out manifest {digest}: {'; '.join(failures[:5]) or 'it has no provider now'}; try again",
            {"digest": digest},
        )

    async def _providers(self, digest: ManifestDigest) -> list[FoundProvider]:
        return list(await self._discovery.find_providers(digest))

    async def select(self, selector: ShardSelector) -> tuple[SignedManifest, ShardEntry]:
        """The shard that a selector means: by manifest and id, by content id, or by file name.

        Raises InvalidParamsError for another combination, AmbiguousNameError, UnknownNameError, ShardNotFoundError.
        """
        name = selector.model or selector.dataset
        by_place = selector.shard_id is not None
        by_content, by_file = selector.content_id is not None, selector.filename is not None
        if (selector.model and selector.dataset) or (by_place + by_content + by_file) != 1 or (name and not by_place):
            raise InvalidParamsError(
                "name a shard by `model` or `dataset` and `shard_id`, or by `content_id` alone, or by `filename` alone"
            )
        if selector.shard_id is not None:
            kind: Kind = "dataset" if selector.dataset else "model"
            signed = await self.resolve(kind, name)
            return signed, signed.manifest.shard(selector.shard_id)

        def fits(entry: ShardEntry) -> bool:
            return entry.content_id == selector.content_id if by_content else entry.filename == selector.filename

        what = f"content {selector.content_id}" if by_content else f"file {selector.filename!r}"
        found = _matches(self._catalog.manifests(), fits)
        if not found and by_content:
            found = _matches(self._fetched.values(), fits)
        if not found:
            found = _matches(await self._cluster(selector.filename), fits)
        failures: list[str] = []
        if not found and selector.filename is not None and self._origin:
            await self._find_at_origins(None, selector.filename, failures)
            found = _matches(self._fetched.values(), fits)
        if not found:
            where = "here, in the cluster or at its origins" if self._origin else "here or in the cluster"
            raise ShardNotFoundError(
                "; ".join([f"no shard {where} is {what}", *failures, "LIST_FILES shows what is here"])
            )
        if len({entry.content_id for _, entry in found}) > 1:
            raise AmbiguousNameError(
                f"{what} is a shard of several manifests: name one of them and its shard_id",
                {"candidates": [_described(signed, entry) for signed, entry in found[:SHOWN_NAMES]]},
            )
        return found[0]

    async def _cluster(self, filename: str | None) -> list[SignedManifest]:
        """Manifests of the cluster that may have a shard of that file name, or any."""
        found = {item.digest: item.name for item in await self._discovery.list_names()}
        if filename is not None:
            found |= {item.digest: item.name for item in await self._discovery.find_name(filename)}
        manifests: list[SignedManifest] = []
        ask_origins = True
        for digest, name in sorted(found.items())[:SEARCHED_MANIFESTS]:
            try:
                manifests.append(await self.manifest(digest, name, ask_origins=ask_origins))
            except ShoalError as err:
                # Where origins cannot say it of one name, a hundred more questions would take very long.
                ask_origins = False
                log.info("left out of a search: %s", err)
        return manifests


def _candidate(signed: SignedManifest) -> Candidate:
    return Candidate(signed.manifest.name, signed.manifest.kind, signed.digest)


def _fitting(candidates: Collection[Candidate], kind: Kind | None, plain: str, digest: str) -> set[Candidate]:
    return {
        candidate
        for candidate in candidates
        if (kind is None or candidate.kind == kind)
        and ((candidate.name == plain and candidate.digest.startswith(digest)) or candidate.digest == plain)
    } or {
        candidate
        for candidate in candidates
        if (kind is None or candidate.kind == kind) and digest and candidate.name == f"{plain}@{digest}"
    }


def _the_one(candidates: set[Candidate], found: str) -> ManifestDigest:
    if len({candidate.digest for candidate in candidates}) > 1:
        shown = [str(candidate) for candidate in sorted(candidates)]
        raise AmbiguousNameError(
            f"{found} {len(shown)}: {', '.join(shown[:SHOWN_NAMES])}; ask for one of them as name@digest",
            {"candidates": shown[:SHOWN_NAMES]},
        )
    return next(iter(candidates)).digest


def _matches(
    manifests: Iterable[SignedManifest], fits: Callable[[ShardEntry], bool]
) -> list[tuple[SignedManifest, ShardEntry]]:
    return [(signed, entry) for signed in manifests for entry in signed.manifest.shards if fits(entry)]


def _described(signed: SignedManifest, entry: ShardEntry) -> dict[str, object]:
    manifest = signed.manifest
    return {
        manifest.kind: f"{manifest.name}@{signed.digest[:12]}",
        "shard_id": entry.shard_id,
        "filename": entry.filename,
        "content_id": entry.content_id,
    }
