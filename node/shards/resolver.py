"""Which manifest a name or digest stands for, and which shard a selector: here, in the cluster, or at the origins."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from node.clock import Clock
from node.shards.interfaces import FetchManifest, OriginCatalog, ProviderDirectory
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
from protocol.manifest import Shard, ShardEntry, SignedManifest, split_name

log = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
FETCHED_MANIFESTS = 64
"""Kept in memory, beside those of which this node has a shard."""
SEARCHED_MANIFESTS = 100
"""At most so many of the cluster, for a shard of which only the file name or the content is known."""
SHOWN_NAMES = 20


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A manifest for which a name may stand."""

    name: str
    kind: str
    digest: ManifestDigest

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:12]}"


class ManifestResolver:
    """Resolves names against the catalog, discovery and origins."""

    def __init__(
        self,
        settings: ShardsSettings,
        catalog: Catalog,
        discovery: ProviderDirectory,
        fetch_manifest: FetchManifest,
        origin: OriginCatalog | None,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._discovery = discovery
        self._fetch_manifest = fetch_manifest
        self._origin = origin
        self._clock = clock
        self._fetched: OrderedDict[ManifestDigest, SignedManifest] = OrderedDict()

    async def resolve(self, kind: Kind | None, name: str | None) -> SignedManifest:
        """The manifest of `name`, `name@digest`, a digest or a manifest's URL; without a name, of the only model of the
        cluster.

        Raises UnknownNameError, AmbiguousNameError, NoSourceError if no provider or origin gives the manifest, and, for
        a URL, what the origin raises.
        """
        if name is None:
            return await self._only(kind or "model")
        if "://" in name:
            return await self._at_url(kind, name)
        plain, digest = split_name(name)
        failures: list[str] = []
        chosen = await self._find(kind, plain, digest) or await self._find_at_origins(kind, name, failures)
        if not chosen:
            chosen = await self._retry(lambda: self._find(kind, plain, digest))
        if not chosen:
            known = ", ".join(await self._known(kind)) or "none"
            raise UnknownNameError(
                f"no {kind or 'model, data set or file'} {name!r} is known {self._searched}; known are: {known}"
                + "".join(f"; {failure}" for failure in failures),
                {"name": name},
            )
        digest = _the_one(chosen, f"{name!r} is the name of")
        return await self.manifest(ManifestDigest(digest), plain)

    async def _at_url(self, kind: Kind | None, url: str) -> SignedManifest:
        if self._origin is None:
            raise InvalidParamsError(f"{url!r} is the URL of a manifest, and this node has no origins")
        signed = await self._origin.manifest_at(url)
        found = signed.manifest.kind
        if kind is not None and found != kind:
            raise InvalidParamsError(f"at {url} is the {found} {signed.manifest.name}, not a {kind}: ask for a {found}")
        return self._keep(signed)

    async def _find_at_origins(self, kind: Kind | None, name: str, failures: list[str]) -> set[Candidate]:
        """What the name stands for at the origins; the message of an origin that fails is appended to `failures`."""
        if self._origin is None:
            return set()
        try:
            found = await self._origin.find_manifests(kind, name)
        except ShoalError as err:
            failures.append(err.message)
            return set()
        return {_candidate(self._keep(signed)) for signed in found}

    def _keep(self, signed: SignedManifest) -> SignedManifest:
        """Keep a manifest that came from elsewhere, so that its digest finds it. This node's own comes first."""
        local = self._catalog.manifest(signed.digest)
        if local:
            return local
        self._fetched[signed.digest] = signed
        self._fetched.move_to_end(signed.digest)
        while len(self._fetched) > FETCHED_MANIFESTS:
            self._fetched.popitem(last=False)
        return signed

    async def _only(self, kind: Kind) -> SignedManifest:
        chosen = await self._retry(lambda: self._all(kind))
        if not chosen:
            raise UnknownNameError(f"the cluster has no {kind} yet: publish one, or wait for its node to be found")
        return await self.manifest(_the_one(chosen, f"name the {kind}: the cluster has"))

    async def _all(self, kind: Kind) -> set[Candidate]:
        found = {Candidate(item.name, item.kind, item.digest) for item in await self._discovery.list_names()}
        found |= {_candidate(signed) for signed in self._catalog.manifests()}
        return {candidate for candidate in found if candidate.kind == kind}

    def _find_local(self, kind: Kind | None, plain: str, digest: str) -> set[Candidate]:
        local = [_candidate(signed) for signed in self._catalog.manifests()]
        fetched = [_candidate(signed) for signed in self._fetched.values()] if digest else []
        return _matching(local, kind, plain, digest) or _matching(fetched, kind, plain, digest)

    async def _find(self, kind: Kind | None, plain: str, digest: str) -> set[Candidate]:
        if local := self._find_local(kind, plain, digest):
            return local
        named = [*await self._discovery.find_name(plain)]
        if digest and digest != plain:  # or the name itself ends like this
            named += await self._discovery.find_name(f"{plain}@{digest}")
        chosen = _matching([Candidate(item.name, item.kind, item.digest) for item in named], kind, plain, digest)
        if not chosen and len(digest) == 64 and await self._discovery.find_providers(ManifestDigest(digest)):
            return {Candidate(plain, kind or "manifest", ManifestDigest(digest))}
        return chosen

    async def _retry(self, look_up: Callable[[], Awaitable[set[Candidate]]]) -> set[Candidate]:
        """Look again for `name_timeout_s`: an announcement may be on its way, or a file not scanned yet."""
        pause_s = 0.1
        give_up_at = self._clock.now() + self._settings.name_timeout_s
        while not (found := await look_up()) and (left_s := give_up_at - self._clock.now()) > 0:
            await self._clock.sleep(min(pause_s, left_s))
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
        """The manifest with this digest, from here, a provider or an origin; its name, if known, helps to find it.

        Raises NoSourceError if no provider or origin gives it.
        """
        local = self._catalog.manifest(digest)
        if local:
            return local
        if digest in self._fetched:
            return self._keep(self._fetched[digest])
        failures: list[str] = []
        for provider in await self._discovery.find_providers(digest):
            try:
                return self._keep(await self._fetch_manifest(provider, digest))
            except ShoalError as err:
                failures.append(f"{provider.host}:{provider.rpc_port}: {err.message}")
        # A record outlives its node for a while: then the name is known, and no node can be asked.
        wanted = digest if name in (None, digest) else f"{name}@{digest}"
        if ask_origins:
            await self._find_at_origins(None, wanted, failures)
        if digest in self._fetched:
            return self._fetched[digest]
        raise NoSourceError(
            f"no node gives manifest {digest}: {'; '.join(failures[:5]) or 'it has no provider now'}; try again",
            {"digest": digest},
        )

    async def select(self, selector: ShardSelector) -> Shard:
        """The shard that a selector names: by manifest and number, by content id, or by file name.

        Raises InvalidParamsError for another combination, AmbiguousNameError, UnknownNameError, ShardNotFoundError.
        """
        name = selector.model or selector.dataset
        by_number = selector.shard_id is not None
        by_content, by_file = selector.content_id is not None, selector.filename is not None
        if (selector.model and selector.dataset) or (by_number + by_content + by_file) != 1 or (name and not by_number):
            raise InvalidParamsError(
                "name a shard by `model` or `dataset` and `shard_id`, or by `content_id` alone, or by `filename` alone"
            )
        if selector.shard_id is not None:
            kind: Kind = "dataset" if selector.dataset else "model"
            return (await self.resolve(kind, name)).shard(selector.shard_id)

        def is_selected(entry: ShardEntry) -> bool:
            return entry.content_id == selector.content_id if by_content else entry.filename == selector.filename

        failures: list[str] = []
        found = _shards(self._catalog.manifests(), is_selected)
        if not found and by_content:
            found = _shards(self._fetched.values(), is_selected)
        if not found:
            found = _shards(await self._search_cluster(selector.filename), is_selected)
        if not found and selector.filename is not None and self._origin:
            await self._find_at_origins(None, selector.filename, failures)
            found = _shards(self._fetched.values(), is_selected)
        selected = f"content {selector.content_id}" if by_content else f"file {selector.filename!r}"
        if not found:
            raise ShardNotFoundError(
                "; ".join([f"no shard {self._searched} is {selected}", *failures, "LIST_FILES shows what is here"])
            )
        if len({shard.entry.content_id for shard in found}) > 1:
            raise AmbiguousNameError(
                f"{selected} is a shard of several manifests: name one of them and its shard_id",
                {"candidates": [_description(shard) for shard in found[:SHOWN_NAMES]]},
            )
        return found[0]

    @property
    def _searched(self) -> str:
        return "here, in the cluster or at its origins" if self._origin else "here or in the cluster"

    async def _search_cluster(self, filename: str | None) -> list[SignedManifest]:
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
                # If origins cannot tell it of one name, a hundred more questions would take very long.
                ask_origins = False
                log.info("left out of a search: %s", err)
        return manifests


def _candidate(signed: SignedManifest) -> Candidate:
    return Candidate(signed.manifest.name, signed.manifest.kind, signed.digest)


def _matching(candidates: Collection[Candidate], kind: Kind | None, plain: str, digest: str) -> set[Candidate]:
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


def _shards(manifests: Iterable[SignedManifest], is_selected: Callable[[ShardEntry], bool]) -> list[Shard]:
    return [Shard(signed, entry) for signed in manifests for entry in signed.manifest.shards if is_selected(entry)]


def _description(shard: Shard) -> dict[str, object]:
    return {
        shard.manifest.kind: f"{shard.manifest.name}@{shard.digest[:12]}",
        "shard_id": shard.entry.shard_id,
        "filename": shard.entry.filename,
        "content_id": shard.entry.content_id,
    }
