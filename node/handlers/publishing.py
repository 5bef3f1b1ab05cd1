"""PUBLISH: a file, a folder or a data set on this machine becomes known and seeded, and uploaded if asked.

RPC is not authenticated, and anybody can fetch what is published. So a request may name neither this node's own files,
nor hidden ones, nor links, nor an origin that the node was not configured with; and if other machines can reach RPC,
nothing outside the folders of `--publish-from`.
"""

from __future__ import annotations

import asyncio
import logging
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from node.background import Background
from node.config import Settings, is_loopback
from node.handlers.shards import MAX_BACKGROUND, ProgressReport
from node.origin.factory import open_store
from node.origin.interface import ObjectStore
from node.origin.publishing import refusal_by_others
from node.origin.settings import origin_settings
from node.origin.url import OriginUrl
from node.rpc import Call
from node.shards.publish.manifest_builder import (
    Publication,
    build_manifest,
    list_publishable,
    publication_of,
    read_publication,
)
from node.shards.publish.publisher import Publisher
from node.shards.publish.uploader import upload
from node.shards.store.hasher import Hasher
from protocol.commands.publishing import PublishParams, PublishResult
from protocol.errors import BusyError, InvalidParamsError, ShoalError
from protocol.manifest import MAX_ORIGINS, SignedManifest, sign_manifest
from protocol.signing import SigningKey

log = logging.getLogger(__name__)

MAX_PUBLICATIONS = 8
"""At a time, those that nobody waits for among them."""


@dataclass(frozen=True)
class PathRules:
    """Which paths a request may name."""

    data_dir: Path
    shards_dir: Path
    loopback: bool
    """Whether RPC is reached from this machine alone."""
    publish_from: tuple[Path, ...] = ()

    def check(self, path: Path) -> None:
        """Raise InvalidParamsError unless the file or folder may be published; OSError if there is none."""
        if not path.is_absolute():
            raise InvalidParamsError(f"{path} is a relative path; give an absolute one, as this node's machine has it")
        kind = path.lstat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise InvalidParamsError(f"{path} is a link or a device: only regular files and folders are published")
        real = path.resolve(strict=True)
        data_dir, shards_dir = self.data_dir.resolve(), self.shards_dir.resolve()
        if real == data_dir or (real.is_relative_to(data_dir) and not real.is_relative_to(shards_dir)):
            raise InvalidParamsError(f"{path} belongs to the node itself (its data folder): it is not published")
        if any(real.is_relative_to(folder.resolve()) for folder in self.publish_from):
            return
        if self.publish_from or not self.loopback:
            raise InvalidParamsError(
                f"{path} is outside the folders that this node publishes from; start it with --publish-from"
            )
        if any(part.startswith(".") for part in real.parts):
            raise InvalidParamsError(f"{path} is hidden; start the node with --publish-from if it is to be published")


@dataclass(frozen=True)
class PublishHandlers:
    """PUBLISH of one node."""

    publisher: Publisher
    key: SigningKey
    rules: PathRules
    own_origins: tuple[str, ...]
    open_origin: Callable[[str], ObjectStore]
    background: Background
    turns: asyncio.Semaphore

    @classmethod
    def of(
        cls,
        settings: Settings,
        publisher: Publisher,
        key: SigningKey,
        own_origins: tuple[str, ...],
        background: Background,
    ) -> PublishHandlers:
        """The handlers of a node with these settings."""
        rules = PathRules(settings.data_dir, settings.shards_dir, is_loopback(settings.listen), settings.publish_from)
        open_origin = partial(open_store, settings=origin_settings(settings))
        return cls(publisher, key, rules, own_origins, open_origin, background, asyncio.Semaphore(MAX_PUBLICATIONS))

    async def publish(self, params: PublishParams, call: Call) -> PublishResult:
        """PUBLISH."""
        if self.turns.locked():
            raise BusyError(f"{MAX_PUBLICATIONS} publications are in progress already; wait for one")
        if not params.wait and self.background.requests >= MAX_BACKGROUND:  # those that wait for a turn are bounded too
            raise BusyError(f"{MAX_BACKGROUND} requests go on in the background already; wait for one")
        urls = self._origins(params.origins)
        paths = await asyncio.to_thread(self._checked_paths, Path(params.path))
        if params.wait:
            return await self._publish(params, urls, paths, call)

        async def go_on() -> None:
            try:
                await self._publish(params, urls, paths, call)
            except (ShoalError, OSError) as error:
                log.warning("PUBLISH of %s, request %s: %s", params.path, call.request_id, error)

        self.background.start(go_on(), name=f"PUBLISH of {params.path}", request_id=call.request_id)
        return PublishResult(
            status="publishing",
            name="",
            digest=None,
            kind="",
            shards=0,
            bytes=0,
            folder="",
            uploaded_bytes=0,
            manifest_urls=[],
        )

    def _origins(self, asked: Sequence[str]) -> list[str]:
        urls = [str(OriginUrl.parse(url)) for url in asked]
        if strange := [url for url in urls if url not in self.own_origins]:
            known = ", ".join(self.own_origins) or "none"
            raise InvalidParamsError(
                f"{strange[0]} is not an origin of this node, which uploads only to its own: {known}"
            )
        return urls

    def _checked_paths(self, path: Path) -> list[Path]:
        """The files, each of them looked at. Raises InvalidParamsError."""
        try:
            self.rules.check(path)
            files = [path]
            if path.is_dir():
                files = [item for item in path.iterdir() if not item.name.startswith(".") and not item.is_dir()]
                for file in files:
                    self.rules.check(file)
        except OSError as error:
            raise InvalidParamsError(f"{path} cannot be published: {error.strerror}") from None
        return files

    async def _publish(self, params: PublishParams, urls: list[str], paths: list[Path], call: Call) -> PublishResult:
        hasher = Hasher()
        async with self.turns:
            try:
                publication = await self._publication(params, paths, hasher, call)
                signed = self._signed(publication, urls)
                folder, publication = await self.publisher.publish(publication, signed if urls else None, hasher)
                uploaded, manifest_urls = 0, []
                for url in urls:
                    published, publication = await self._upload(url, signed, publication, hasher, call)
                    uploaded += published[0]
                    manifest_urls.append(published[1])
            except OSError as error:
                raise InvalidParamsError(f"{error.filename or params.path}: {error.strerror}") from None
            finally:
                await hasher.close()
        manifest = publication.manifest
        return PublishResult(
            status="published",
            name=manifest.name,
            digest=manifest.digest,
            kind=manifest.kind,
            shards=len(manifest.shards),
            bytes=manifest.total_bytes,
            folder=str(folder),
            uploaded_bytes=uploaded,
            manifest_urls=manifest_urls,
        )

    async def _publication(self, params: PublishParams, paths: list[Path], hasher: Hasher, call: Call) -> Publication:
        path = Path(params.path)
        if params.manifest is not None:
            if params.name not in (None, params.manifest.name):
                raise InvalidParamsError(f"the manifest has the name {params.manifest.name!r}: leave the name out")
            return await asyncio.to_thread(publication_of, path, params.manifest)
        held = await asyncio.to_thread(read_publication, path, params.name)
        if held is not None:
            return held
        files = list_publishable(paths, lambda *_: None)
        name = params.name if params.name is not None or path.is_file() else path.name
        total = sum(file.lstat().st_size for file in files.values())
        return await build_manifest(
            name,
            files,
            hasher,
            lambda shard_id, done, before: ProgressReport(call, shard_id).send("verifying", before + done, total),
        )

    def _signed(self, publication: Publication, urls: Sequence[str]) -> SignedManifest:
        named = dict.fromkeys(url for url in (*urls, *publication.origins) if refusal_by_others(url) is None)
        return sign_manifest(publication.manifest, self.key, list(named)[:MAX_ORIGINS])

    async def _upload(
        self, url: str, signed: SignedManifest, publication: Publication, hasher: Hasher, call: Call
    ) -> tuple[tuple[int, str], Publication]:
        total = sent = 0

        def count(more: int) -> None:
            nonlocal sent
            sent += more
            ProgressReport(call, 0).send("uploading", sent, total)

        store = self.open_origin(url)
        try:
            total = signed.manifest.total_bytes
            published, publication = await upload(
                store, signed, publication, hasher, lambda *_: None, lambda _: None, count
            )
        finally:
            await store.close()
        return (published.uploaded_bytes, published.manifest_url), publication
