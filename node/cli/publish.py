"""`publish`: put files into the shards folder of a daemon, which seeds and announces them, and at origins."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from node.cli.console import bytes_progress, err, examples, fail, show_manifest
from node.cli.uploading import check_origins, named_origins, show_published, upload_all
from node.config import KEY_FILENAME, Settings, load_settings
from node.shards.publish.manifest_builder import Chosen, compose, files_of, held_in
from node.shards.publish.placement import held_at, place_all, place_of
from node.shards.store.hasher import Hasher
from protocol.content import hash_file
from protocol.errors import InvalidParamsError
from protocol.manifest import SignedManifest, sign_manifest
from protocol.signing import SigningKey

EXAMPLES = examples(
    "python -m node publish train/*.parquet --name fineweb-edu",
    "python -m node publish cut/my-model",
    "python -m node publish weights.gguf --shards-dir /data/shards",
    "python -m node publish cut/my-model --origin o3://bucket/shoal",
    "python -m node publish train/*.parquet --name fineweb-edu --origin s3://bucket --only-origin",
)


def publish(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", exists=True, help="Files, or one folder of them.")],
    *,
    name: Annotated[str | None, typer.Option(help="Of the data set. Default: the folder's own.")] = None,
    config: Annotated[Path | None, typer.Option(help="The daemon's TOML file.", envvar="SHOAL_CONFIG")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="The daemon's.")] = None,
    shards_dir: Annotated[Path | None, typer.Option(help="The daemon's. Default: DATA_DIR/shards.")] = None,
    origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Also upload to this origin; repeatable.")
    ] = None,
    only_origin: Annotated[bool, typer.Option("--only-origin", help="Leave the daemon's shards folder alone.")] = False,
    o3_endpoint: Annotated[str | None, typer.Option(metavar="URL", help="Of Akave's gateway.")] = None,
    s3_endpoint: Annotated[str | None, typer.Option(metavar="URL", help="Of s3:// origins. Default: Amazon's.")] = None,
    origin_key_file: Annotated[Path | None, typer.Option(help="The key to encrypt objects with.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print digest, folder and manifest as JSON.")] = False,
) -> None:
    """Put files where a daemon seeds them, and at origins.

    A running daemon takes them up within seconds. One file without --name is a loose file, found by its file name;
    several files, a folder, or any with --name are a data set; a folder made by `split` is that model. Files are
    linked where the disk is the same (do not change them in place afterwards), copied otherwise.
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
    stores = check_origins(settings, origin or [])
    try:
        chosen = _chosen(paths, name)
    except InvalidParamsError as error:
        fail(error.message, code=2)
    manifest = chosen.manifest
    target, loose = place_of(manifest, settings.shards_dir, keep_manifest=bool(origin))
    signed = _signed(chosen, None if only_origin else target, settings, origin) if origin else None
    if not only_origin:
        place_all(
            manifest,
            chosen.files,
            target,
            signed,
            loose=loose,
            is_same=lambda path, entry: hash_file(path).content_id == entry.content_id,
        )
    published = upload_all(signed, chosen, stores) if signed else []
    more = {"origins": [asdict(one) for one in published]} if origin else {}
    show_manifest(manifest, None if only_origin else target, json_output=json_output, more=more)
    if not json_output:
        show_published(published)


def _chosen(paths: Sequence[Path], name: str | None) -> Chosen:
    held = held_in(paths[0], name) if len(paths) == 1 else None
    if held is not None:
        return held
    if name is None and len(paths) > 1:
        fail("several paths need a --name for the data set that they become", code=2)
    files = files_of(paths, _tell_left_out)
    if name is None and not paths[0].is_file():
        name = paths[0].resolve().name
    return asyncio.run(_composed(name, files))


async def _composed(name: str | None, files: dict[str, Path]) -> Chosen:
    hasher = Hasher()
    with bytes_progress() as progress:
        bar = progress.add_task("", total=sum(file.stat().st_size for file in files.values()))
        try:
            return await compose(
                name,
                files,
                hasher,
                lambda shard_id, done, before: progress.update(
                    bar, description=f"hashing {shard_id + 1}/{len(files)}", completed=before + done
                ),
            )
        finally:
            await hasher.close()


def _signed(chosen: Chosen, target: Path | None, settings: Settings, urls: Sequence[str]) -> SignedManifest:
    """The manifest, signed by this machine's node, with these origins and those that were named before, also by what
    lies at `target`.
    """
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        key = SigningKey.load_or_create(settings.data_dir / KEY_FILENAME)
    except ValueError as error:
        fail(error)
    held = held_at(target, chosen.manifest) if target else None
    before = held.signed.origins if held else ()
    return sign_manifest(chosen.manifest, key, named_origins(urls, [*before, *chosen.origins]))


def _tell_left_out(folder: Path, left_out: list[str]) -> None:
    err.print(f"left out, only files are published: the folders {', '.join(left_out)} in {folder}", markup=False)
