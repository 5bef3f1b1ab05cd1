"""The part of `publish` that speaks to origins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from node.cli.console import bytes_progress, err, fail, human_bytes, out
from node.config import Settings
from node.origin.configured import origin_settings
from node.origin.interface import ObjectStore
from node.origin.opening import open_store
from node.origin.policy import refusal
from node.origin.publishing import Missing, Published, Source, missing_at, publish
from node.origin.url import OriginUrl
from node.shards.hasher import FileChangedError, Hashed, Hasher
from node.swarm.torrent import Torrent
from protocol.errors import InvalidParamsError, InvalidShardError
from protocol.ids import ContentId
from protocol.manifest import MAX_ORIGINS, ShardEntry, SignedManifest

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


def upload(
    signed: SignedManifest,
    files: Mapping[str, Path],
    hashed: Mapping[ContentId, Hashed] | None,
    stores: Sequence[Opener],
) -> list[Published]:
    """Bring shards, torrent files and the manifest to each origin; what is there already is skipped.

    `files` are by file name. `hashed` is what came of hashing them just now; without it the files that go are hashed
    first, and must be what their manifest says. Raises OriginError, InvalidShardError.
    """
    try:
        return asyncio.run(_upload(signed, files, dict(hashed or {}), stores))
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from there", code=130)


async def _upload(
    signed: SignedManifest, files: Mapping[str, Path], hashed: dict[ContentId, Hashed], stores: Sequence[Opener]
) -> list[Published]:
    published = []
    hasher = Hasher()
    try:
        for opener in stores:
            store = opener()
            try:
                missing = await missing_at(store, signed.manifest)
                for one in missing:
                    if one.entry.content_id not in hashed:
                        hashed[one.entry.content_id] = await _hashed(hasher, files[one.entry.filename], one.entry)
                published.append(await _send(store, signed, missing, files, hashed))
            finally:
                await store.close()
    finally:
        await hasher.close()
    return published


async def _send(
    store: ObjectStore,
    signed: SignedManifest,
    missing: list[Missing],
    files: Mapping[str, Path],
    hashed: Mapping[ContentId, Hashed],
) -> Published:
    sources, torrents = {}, {}
    for one in missing:
        entry = one.entry
        content, seen = hashed[entry.content_id].content, hashed[entry.content_id].fingerprint
        sources[entry.content_id] = Source(files[entry.filename], seen.size, seen.mtime_ns)
        if one.torrent:
            torrent = Torrent.of(entry.filename, entry.size, entry.content_id)
            torrents[entry.content_id] = torrent.metainfo(content.piece_layer)
    with bytes_progress() as progress:
        bar = progress.add_task("uploading", total=sum(one.bytes for one in missing), visible=bool(missing))
        return await publish(store, signed, missing, sources, torrents, lambda count: progress.advance(bar, count))


async def _hashed(hasher: Hasher, file: Path, entry: ShardEntry) -> Hashed:
    with bytes_progress() as progress:
        bar = progress.add_task(f"hashing {entry.filename}", total=entry.size)
        try:
            hashed = await hasher.hash(file, entry.kind, progress=lambda done: progress.update(bar, completed=done))
        except FileChangedError:
            fail(f"{file} is being written to; publish it when it is whole")
    if hashed.content.content_id != entry.content_id:
        raise InvalidShardError(
            f"{file} holds content {hashed.content.content_id}, its manifest says {entry.content_id}: split the model "
            "again, or remove the manifest and publish the files as they are"
        )
    return hashed


def show_published(published: Sequence[Published]) -> None:
    """A line for each origin, with the URL that finds what was published."""
    for one in published:
        there = f", {human_bytes(one.skipped_bytes)} were there" if one.skipped_bytes else ""
        line = f"{one.origin}: {human_bytes(one.uploaded_bytes)} uploaded{there}; its manifest: {one.manifest_url}"
        out.print(line, markup=False, soft_wrap=True)
