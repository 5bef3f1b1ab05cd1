"""The manifest of a data set, and the origins that its shards are read from: the given one, and those it names."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from node.files import atomic_write
from node.origin.core.credentials import Credentials
from node.origin.layout import decode_manifest, encode_manifest, is_address, split_address
from node.origin.policy import check_host, for_stranger, refusal
from node.origin.registry import OriginRegistry
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import InvalidManifestError, OriginDeniedError, OriginError, ShoalError, UnknownNameError
from protocol.manifest import SignedManifest
from torch_bridge.core.client import O3Client
from torch_bridge.core.location import StoreLocation, with_secrets
from torch_bridge.core.loop_thread import loop_thread
from torch_bridge.core.store import Store

log = logging.getLogger(__name__)
_LOOK_S = 10.0
"""For how long an origin that does not answer is asked for a newer manifest than the one that was kept."""


class DatasetOrigins:
    """Thread-safe; it can be pickled, with its manifest."""

    def __init__(self, where: str, dataset: str | None, client: O3Client, state: Path) -> None:
        """`state` is a folder of this machine where the last manifest is kept."""
        self.where, self.dataset, self.client = where, dataset, client
        mark = hashlib.sha256(f"{where} {dataset}".encode()).hexdigest()[:16]
        self._kept_at = state / f"manifest-{mark}.json"
        self._signed: SignedManifest | None = None
        self._begin()

    def _begin(self) -> None:
        self._guard = threading.Lock()
        self._guests: dict[str, Store] = {}

    def signed(self) -> SignedManifest:
        """The newest valid manifest, its signature and digest checked; read once. If the origin does not answer, the
        one that this machine read last, with a warning.

        Raises UnknownNameError, InvalidManifestError, InvalidParamsError, OriginError.
        """
        with self._guard:
            if self._signed is None:
                kept, retry = self._kept(), self.client.retry
                if kept is not None:
                    retry = replace(retry, total_s=min(retry.total_s, _LOOK_S))
                try:
                    settings = with_secrets(self.client.settings, self.where.partition("://")[0])
                    settings = replace(settings, origins=(self._bases()[0],), retry_total_s=0.0)
                    self._signed = loop_thread().run(retry.run(lambda _: self._read(settings)))
                except OriginError as err:
                    if kept is None or not err.retryable:
                        raise
                    log.warning("the manifest of %s that was read last is used: %s", kept.manifest.name, err)
                    self._signed = kept
                else:
                    self._keep(self._signed)
            return self._signed

    def stores(self) -> Iterator[Store]:
        """The given origin first, then those that the manifest names, which get no key and no credential of this user.

        Origins that a manifest may not name are left out, with a line in the log.
        """
        signed, own = self.signed(), self._bases()
        yield from map(self.client.at, own)
        for named in dict.fromkeys(signed.origins):
            try:
                url = str(OriginUrl.parse(named))
                if url in own:
                    continue
                yield self.client.at(url) if _is_under(url, own) else self._guest(url)
            except ShoalError as err:
                log.info("an origin of manifest %s is not asked: %s", signed.manifest.name, err)

    def close(self) -> None:
        """Close this process's connections."""
        for store in self._guests.values():
            store.close()
        self.client.close()

    def _guest(self, url: str) -> Store:
        if why := refusal(url):
            raise OriginDeniedError(f"origin {url}: {why}")
        loop_thread().run(check_host(url))
        if url not in self._guests:
            settings = for_stranger(url, self.client.settings)
            if url.startswith(("https://", "hf://")):
                settings = replace(settings, credentials=Credentials())
            self._guests.setdefault(url, Store(StoreLocation(url, settings, self.client.retry)))
        return self._guests[url]

    def _bases(self) -> list[str]:
        """The origins that the user gave."""
        if self.dataset is None:
            return [str(OriginUrl.parse(split_address(self.where)[0]))]
        bases = [str(OriginUrl.parse(self.where))]
        if is_address(self.dataset):
            bases.append(str(OriginUrl.parse(split_address(self.dataset)[0])))
        return list(dict.fromkeys(bases))

    async def _read(self, settings: OriginSettings) -> SignedManifest:
        address = self.where if self.dataset is None else self.dataset
        if is_address(address):
            async with OriginRegistry.open(settings, trusted=[address]) as origins:
                return await origins.manifest_at(address)
        async with OriginRegistry.open(settings) as origins:
            found = await origins.find_manifests(None, address)
        if not found:
            raise UnknownNameError(
                f"origin {self._bases()[0]} has no data set {address!r}: publish it there with --origin, or name its "
                "manifest's URL"
            )
        return found[0]

    # The manifest on disk

    def _kept(self) -> SignedManifest | None:
        try:
            return decode_manifest(self._kept_at.read_bytes())
        except (OSError, InvalidManifestError):
            return None

    def _keep(self, signed: SignedManifest) -> None:
        try:
            self._kept_at.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self._kept_at, encode_manifest(signed, 0))
        except OSError as err:
            log.warning("the manifest of %s is not kept for a start without its origin: %s", self.where, err)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_guard", "_guests")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def _is_under(url: str, own: list[str]) -> bool:
    return any(url.startswith(f"{base.rstrip('/')}/") for base in own)
