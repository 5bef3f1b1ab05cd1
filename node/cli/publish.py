"""`publish`: put files into the shards folder of a daemon, which seeds and announces them, and at origins."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.progress import Progress, TaskID

from node.cli.console import bytes_progress, err, examples, fail, show_manifest
from node.cli.placing import held_at, place_all
from node.cli.uploading import check_origins, named_origins, show_published, upload
from node.config import KEY_FILENAME, Settings, load_settings
from node.formats.kinds import kind_of
from node.shards.hasher import FileChangedError, Hashed, Hasher
from node.shards.holding import Holding, folder_names, read_manifest, shard_path
from node.shards.scan import LOOSE_KINDS
from protocol.errors import InvalidManifestError, InvalidShardError
from protocol.ids import ContentId
from protocol.manifest import (
    MANIFEST_FILENAME,
    Manifest,
    ManifestName,
    ShardEntry,
    SignedManifest,
    check_manifest,
    safe_filename,
    sign_manifest,
    split_name,
)
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
    chosen = _chosen(paths, name)
    manifest, root = chosen.manifest, settings.shards_dir
    if manifest.kind != "file":
        target = root / manifest.name.replace("/", "--")
    elif manifest.shards[0].kind in LOOSE_KINDS.values() and not origin:
        target = root
    else:  # a daemon shares a loose file that is neither GGUF nor parquet only where a manifest names it
        target = root / folder_names(manifest.name, manifest.digest)[0]
    signed = _signed(chosen, None if only_origin else target, settings, origin) if origin else None
    if not only_origin:
        place_all(manifest, chosen.files, target, signed, loose=target == root)
    published = upload(signed, chosen.files, chosen.hashed, stores) if signed else []
    more = {"origins": [asdict(one) for one in published]} if origin else {}
    show_manifest(manifest, None if only_origin else target, json_output=json_output, more=more)
    if not json_output:
        show_published(published)


@dataclass(frozen=True)
class _Chosen:
    """What is to be published."""

    manifest: Manifest
    files: Mapping[str, Path]
    """By file name."""
    hashed: Mapping[ContentId, Hashed] | None
    """The files as they were when they were hashed, by content; None where nothing was hashed yet."""
    origins: tuple[str, ...] = ()
    """Where it lies already, as its manifest says."""


def _chosen(paths: Sequence[Path], name: str | None) -> _Chosen:
    held = _manifest_of(paths[0]) if len(paths) == 1 else None
    if held is not None:
        manifest = held.manifest
        if name is not None and name != manifest.name:
            fail(f"{paths[0]} holds a manifest, which names it {manifest.name!r}: leave --name out", code=2)
        _check_findable(manifest.name)
        files = {entry.filename: paths[0] / entry.filename for entry in manifest.shards}
        return _Chosen(manifest, files, None, held.signed.origins)
    files = _files_of(paths)
    if name is None and len(paths) == 1:
        name = None if paths[0].is_file() else paths[0].resolve().name
    elif name is None:
        fail("several paths need a --name for the data set that they become", code=2)
    manifest, hashed = _hashed(
        "file" if name is None else "dataset", next(iter(files)) if name is None else name, files
    )
    return _Chosen(manifest, files, hashed)


def _check_findable(name: str) -> None:
    if split_name(name)[1]:
        fail(
            f"{name!r} would be read as a digest, or a name with one behind its @, and never be found: give another "
            "--name",
            code=2,
        )


def _signed(chosen: _Chosen, target: Path | None, settings: Settings, urls: Sequence[str]) -> SignedManifest:
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


def _manifest_of(folder: Path) -> Holding | None:
    """What a folder made by `split`, or by an earlier `publish`, holds. Raises InvalidShardError where files lack."""
    path = folder / MANIFEST_FILENAME
    if not path.is_file():
        return None
    held: Holding | None = read_manifest(path, SigningKey.generate())
    if held is None:
        return None
    for entry in held.manifest.shards:
        file = folder / entry.filename
        found = file.stat().st_size if file.is_file() else None
        if found != entry.size:
            there = "is not there" if found is None else f"has {found} bytes"
            raise InvalidShardError(f"{file} {there}, its manifest says {entry.size} bytes; split the model again")
    return held


def _files_of(paths: Sequence[Path]) -> dict[str, Path]:
    """The files by their names, in the order of the names; fails where two have one name, or there is none."""
    files: dict[str, Path] = {}
    for file in (file for path in paths for file in _listed(path)):
        other = files.setdefault(file.name, file)
        if other.resolve() != file.resolve():
            fail(f"{other} and {file} have one name: rename one of them, a data set has each name once")
    if not files:
        fail(f"nothing to publish in {', '.join(map(str, paths))}: no file there")
    return dict(sorted(files.items()))


def _listed(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    inside = [item for item in path.iterdir() if not item.name.startswith(".")]
    if left_out := sorted(item.name for item in inside if item.is_dir()):
        err.print(f"left out, only files are published: the folders {', '.join(left_out)} in {path}", markup=False)
    yield from (item for item in inside if item.is_file())


def _hashed(kind: str, name: str, files: Mapping[str, Path]) -> tuple[Manifest, dict[ContentId, Hashed]]:
    """The manifest of these files, and what came of hashing them."""
    try:
        msgspec.convert(name, ManifestName)
        for component in name.split("/"):
            safe_filename(component)
    except (msgspec.ValidationError, InvalidManifestError):
        fail(f"{name!r} is no name: give --name NAME, or OWNER/NAME, of at most 200 characters", code=2)
    _check_findable(name)
    entries, hashed = asyncio.run(_entries(files))
    manifest = msgspec.convert({"name": name, "kind": kind, "shards": msgspec.to_builtins(entries)}, Manifest)
    check_manifest(manifest)
    return manifest, hashed


async def _entries(files: Mapping[str, Path]) -> tuple[list[ShardEntry], dict[ContentId, Hashed]]:
    """Check and hash the files, in a process of its own: some damaged files end the one that reads them."""
    entries: list[ShardEntry] = []
    by_content: dict[ContentId, Hashed] = {}
    hasher, before = Hasher(), 0
    with bytes_progress() as progress:
        bar = progress.add_task("", total=sum(file.stat().st_size for file in files.values()))
        try:
            for shard_id, (filename, file) in enumerate(files.items()):
                progress.update(bar, description=f"hashing {shard_id + 1}/{len(files)}")
                kind = kind_of(file)
                hashed = await hasher.hash(file, kind, progress=partial(_show, progress, bar, before))
                content = hashed.content
                entry = ShardEntry(
                    shard_id=shard_id,
                    filename=filename,
                    size=content.size,
                    content_id=content.content_id,
                    kind=kind,
                    rows=hashed.rows,
                )
                shard_path(file.parent, entry)
                entries.append(entry)
                by_content[content.content_id] = hashed
                before += content.size
                progress.update(bar, completed=before)
        except FileChangedError:
            fail(f"{file} is being written to; publish it when it is whole")
        finally:
            await hasher.close()
    return entries, by_content


def _show(progress: Progress, bar: TaskID, before: int, done: int) -> None:
    progress.update(bar, completed=before + done)
