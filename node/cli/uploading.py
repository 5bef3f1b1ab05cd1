"""The part of `publish` that speaks to origins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from node.cli.console import bytes_progress, err, fail, human_bytes, out
from node.config import Settings
from node.origin.core.policy import refusal
from node.origin.factory import open_store
from node.origin.interface import ObjectStore
from node.origin.publishing import PublishResult
from node.origin.settings import origin_settings
from node.origin.url import OriginUrl
from node.shards.publish.manifest_builder import Chosen
from node.shards.publish.uploader import upload
from node.shards.store.hasher import Hasher
from protocol.errors import InvalidParamsError
from protocol.manifest import MAX_ORIGINS, SignedManifest

Opener = Callable[[], ObjectStore]
_READ_ALONE = ("https", "http", "hf")


def check_origins(settings: Settings, urls: Sequence[str]) -> list[Opener]:
    """What opens each of the stores; fails, before anything is hashed, where a URL cannot be one."""
    try:
        known = origin_settings(settings)
        places = [OriginUrl.parse(one) for one in urls]
        for place in places:
            if place.scheme in _READ_ALONE:
                fail(f"{place} is only read from: publish to an o3://, akave://, s3:// or file:// origin", code=2)
            open_store(place, known)  # what is missing, a key file or half of a credential, is known now
    except InvalidParamsError as error:
        fail(error.message, code=2)
    return [partial(open_store, place, known) for place in places]


def named_origins(urls: Sequence[str], before: Sequence[str]) -> list[str]:
    """The origins that a manifest names: those of them that another node would ask, the new ones in front."""
    named: dict[str, None] = {}
    for url in [str(OriginUrl.parse(one)) for one in urls] + list(before):
        if (why := refusal(url)) is None:
            named[url] = None
        elif url not in before:
            err.print(
                f"the manifest does not name {url}: {why}; nodes need it as their own --origin",
                markup=False,
                soft_wrap=True,
            )
    return list(named)[:MAX_ORIGINS]


def upload_all(signed: SignedManifest, chosen: Chosen, stores: Sequence[Opener]) -> list[PublishResult]:
    """Bring shards, torrent files and the manifest to each origin; what is there already is skipped.

    Raises OriginError, InvalidShardError.
    """
    try:
        return asyncio.run(_upload_all(signed, chosen, stores))
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from there", code=130)


async def _upload_all(signed: SignedManifest, chosen: Chosen, stores: Sequence[Opener]) -> list[PublishResult]:
    published = []
    hasher = Hasher()
    try:
        for opener in stores:
            store = opener()
            try:
                one, chosen = await _upload(store, signed, chosen, hasher)
                published.append(one)
            finally:
                await store.close()
    finally:
        await hasher.close()
    return published


async def _upload(
    store: ObjectStore, signed: SignedManifest, chosen: Chosen, hasher: Hasher
) -> tuple[PublishResult, Chosen]:
    with bytes_progress() as progress:
        hashing = progress.add_task("hashing", total=signed.manifest.total_bytes, visible=False)
        bar = progress.add_task("uploading", total=None, visible=False)
        return await upload(
            store,
            signed,
            chosen,
            hasher,
            lambda _, done, before: progress.update(hashing, completed=before + done, visible=True),
            lambda missing: progress.update(bar, total=sum(one.bytes for one in missing), visible=bool(missing)),
            lambda count: progress.advance(bar, count),
        )


def show_published(published: Sequence[PublishResult]) -> None:
    """A line for each origin, with the URL that finds what was published."""
    for one in published:
        there = f", {human_bytes(one.skipped_bytes)} were there" if one.skipped_bytes else ""
        line = f"{one.origin}: {human_bytes(one.uploaded_bytes)} uploaded{there}; its manifest: {one.manifest_url}"
        out.print(line, markup=False, soft_wrap=True)
