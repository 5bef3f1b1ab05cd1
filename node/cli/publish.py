"""`publish`: put files into the shards folder of a daemon, which seeds and announces them, and at origins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from node.cli.console import bytes_progress, err, examples, fail, human_bytes, out, show_manifest
from node.cli.options import ConfigFile, DataDir, O3Endpoint, OriginKeyFile, S3Endpoint, ShardsDir
from node.config import KEY_FILENAME, Settings, load_settings
from node.origin.factory import open_store
from node.origin.interface import ObjectStore
from node.origin.publishing import OriginPublication, refusal_by_others
from node.origin.settings import origin_settings
from node.origin.url import OriginUrl
from node.shards.pins import pin_from_outside
from node.shards.publish.manifest_builder import Publication, build_manifest, list_publishable, read_publication
from node.shards.publish.placement import manifest_at, place_files, target_folder
from node.shards.publish.uploader import upload
from node.shards.store.hasher import Hasher
from protocol.content import hash_file
from protocol.errors import InvalidParamsError
from protocol.manifest import MAX_ORIGINS, SignedManifest, sign_manifest
from protocol.signing import SigningKey

EXAMPLES = examples(
    "shoal publish train/*.parquet --name fineweb-edu",
    "shoal publish cut/my-model",
    "shoal publish weights.gguf --shards-dir /data/shards",
    "shoal publish cut/my-model --origin o3://bucket/shoal",
    "shoal publish train/*.parquet --name fineweb-edu --origin s3://bucket --only-origin",
)

Opener = Callable[[], ObjectStore]
_READ_ALONE = ("https", "http", "hf")


def publish(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", exists=True, help="Files, or one folder of them.")],
    *,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the data set. Default: the folder's own.")
    ] = None,
    config: ConfigFile = None,
    data_dir: DataDir = None,
    shards_dir: ShardsDir = None,
    origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Also upload to this origin; repeatable.")
    ] = None,
    only_origin: Annotated[bool, typer.Option("--only-origin", help="Leave the daemon's shards folder alone.")] = False,
    o3_endpoint: O3Endpoint = None,
    s3_endpoint: S3Endpoint = None,
    origin_key_file: OriginKeyFile = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print digest, folder and manifest as JSON.")] = False,
) -> None:
    """Put files where a daemon seeds them, and at origins.

    A running daemon takes them up within seconds. One file without --name is a loose file, found by its file name;
    several files, a folder, or any with --name are a data set; a folder made by `split` is that model. Files are
    linked if the disk is the same (do not change them in place afterwards), else copied.
    """
    if only_origin and not origin:
        fail("--only-origin needs an --origin URL", code=2)
    settings = load_settings(
        config=config,
        data_dir=data_dir,
        shards_dir=shards_dir,
        o3_endpoint=o3_endpoint,
        s3_endpoint=s3_endpoint,
        origin_key_file=origin_key_file,
    )
    stores = _check_origins(settings, origin or [])
    try:
        chosen = _chosen(paths, name)
    except InvalidParamsError as error:
        fail(error.message, code=2)
    manifest = chosen.manifest
    target, loose = target_folder(manifest, settings.shards_dir, keep_manifest=bool(origin))
    signed = _signed(chosen, None if only_origin else target, settings, origin) if origin else None
    if not only_origin:
        place_files(
            manifest,
            chosen.files,
            target,
            signed,
            loose=loose,
            is_same=lambda path, entry: hash_file(path).content_id == entry.content_id,
        )
        placed = (target / entry.filename for entry in manifest.shards)
        pin_from_outside(settings.data_dir, settings.shards_dir, placed)
    published = _upload_to_all(signed, chosen, stores) if signed else []
    more = {"origins": [asdict(one) for one in published]} if origin else {}
    show_manifest(manifest, None if only_origin else target, json_output=json_output, more=more)
    if not json_output:
        _show_published(published)


def _chosen(paths: Sequence[Path], name: str | None) -> Publication:
    held = read_publication(paths[0], name) if len(paths) == 1 else None
    if held is not None:
        return held
    if name is None and len(paths) > 1:
        fail("several paths need a --name for the data set that they become", code=2)
    files = list_publishable(paths, _tell_left_out)
    if name is None and not paths[0].is_file():
        name = paths[0].resolve().name
    return asyncio.run(_composed(name, files))


async def _composed(name: str | None, files: dict[str, Path]) -> Publication:
    hasher = Hasher()
    with bytes_progress() as progress:
        bar = progress.add_task("", total=sum(file.stat().st_size for file in files.values()))
        try:
            return await build_manifest(
                name,
                files,
                hasher,
                lambda shard_id, done, before: progress.update(
                    bar, description=f"hashing {shard_id + 1}/{len(files)}", completed=before + done
                ),
            )
        finally:
            await hasher.close()


def _signed(chosen: Publication, target: Path | None, settings: Settings, urls: Sequence[str]) -> SignedManifest:
    """The manifest, signed by this machine's node, with these origins and those that were named before, also by what
    lies at `target`.
    """
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        key = SigningKey.load_or_create(settings.data_dir / KEY_FILENAME)
    except ValueError as error:
        fail(error)
    held = manifest_at(target, chosen.manifest) if target else None
    before = held.origins if held else ()
    return sign_manifest(chosen.manifest, key, _named_origins(urls, [*before, *chosen.origins]))


def _tell_left_out(folder: Path, left_out: list[str]) -> None:
    err.print(f"left out, only files are published: the folders {', '.join(left_out)} in {folder}", markup=False)


def _check_origins(settings: Settings, urls: Sequence[str]) -> list[Opener]:
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


def _named_origins(urls: Sequence[str], before: Sequence[str]) -> list[str]:
    """The origins that a manifest names: those of them that another node would ask, the new ones in front."""
    named: dict[str, None] = {}
    for url in [str(OriginUrl.parse(one)) for one in urls] + list(before):
        if (why := refusal_by_others(url)) is None:
            named[url] = None
        elif url not in before:
            err.print(
                f"the manifest does not name {url}: {why}; nodes need it as their own --origin",
                markup=False,
                soft_wrap=True,
            )
    return list(named)[:MAX_ORIGINS]


def _upload_to_all(signed: SignedManifest, chosen: Publication, stores: Sequence[Opener]) -> list[OriginPublication]:
    """Bring shards, torrent files and the manifest to each origin; what is there already is skipped.

    Raises OriginError, InvalidShardError.
    """
    try:
        return asyncio.run(_upload_each(signed, chosen, stores))
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from there", code=130)


async def _upload_each(
    signed: SignedManifest, chosen: Publication, stores: Sequence[Opener]
) -> list[OriginPublication]:
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
    store: ObjectStore, signed: SignedManifest, chosen: Publication, hasher: Hasher
) -> tuple[OriginPublication, Publication]:
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


def _show_published(published: Sequence[OriginPublication]) -> None:
    """A line for each origin, with the URL that finds what was published."""
    for one in published:
        there = f", {human_bytes(one.skipped_bytes)} were there" if one.skipped_bytes else ""
        line = f"{one.origin}: {human_bytes(one.uploaded_bytes)} uploaded{there}; its manifest: {one.manifest_url}"
        out.print(line, markup=False, soft_wrap=True)
