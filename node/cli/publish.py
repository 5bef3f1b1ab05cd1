"""`publish`: put files into the shards folder of a daemon, which seeds and announces them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.progress import Progress, TaskID

from node.cli.console import bytes_progress, err, examples, fail, show_manifest
from node.config import load_settings
from node.formats.kinds import kind_of
from node.shards.hasher import FileChangedError, Hasher
from node.shards.holding import Holding, folder_names, read_manifest, shard_path
from node.shards.scan import LOOSE_KINDS
from protocol.content import hash_file
from protocol.errors import InvalidManifestError, InvalidShardError
from protocol.manifest import (
    MANIFEST_FILENAME,
    Manifest,
    ManifestName,
    ShardEntry,
    check_manifest,
    safe_filename,
)
from protocol.signing import SigningKey

EXAMPLES = examples(
    "python -m node publish train/*.parquet --name fineweb-edu",
    "python -m node publish cut/my-model",
    "python -m node publish weights.gguf --shards-dir /data/shards",
)


def publish(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", exists=True, help="Files, or one folder of them.")],
    *,
    name: Annotated[str | None, typer.Option(help="Of the data set. Default: the folder's own.")] = None,
    config: Annotated[Path | None, typer.Option(help="The daemon's TOML file.", envvar="SHOAL_CONFIG")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="The daemon's.")] = None,
    shards_dir: Annotated[Path | None, typer.Option(help="The daemon's. Default: DATA_DIR/shards.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print digest, folder and manifest as JSON.")] = False,
) -> None:
    """Put files where a daemon seeds and announces them.

    A running daemon takes them up within seconds. One file without --name is a loose file, found by its file name;
    several files, a folder, or any with --name are a data set; a folder made by `split` is that model. Files are
    linked where the disk is the same (do not change them in place afterwards), copied otherwise.
    """
    root = load_settings(config=config, data_dir=data_dir, shards_dir=shards_dir).shards_dir
    held = _manifest_of(paths[0]) if len(paths) == 1 else None
    if held is not None:
        if name is not None and name != held.name:
            fail(f"{paths[0]} holds a manifest, which names it {held.name!r}: leave --name out", code=2)
        target = root / held.name.replace("/", "--")
        _place_all(held, {entry.filename: paths[0] / entry.filename for entry in held.shards}, target)
        show_manifest(held, target, json_output=json_output)
        return
    files = _files_of(paths)
    if name is None and len(paths) == 1:
        name = None if paths[0].is_file() else paths[0].resolve().name
    elif name is None:
        fail("several paths need a --name for the data set that they become", code=2)
    manifest = _manifest("file" if name is None else "dataset", next(iter(files)) if name is None else name, files)
    if name is not None:
        target = root / name.replace("/", "--")
    elif manifest.shards[0].kind in LOOSE_KINDS.values():
        target = root
    else:  # a daemon shares a loose file that is neither GGUF nor parquet only where a manifest names it
        target = root / folder_names(manifest.name, manifest.digest)[0]
    _place_all(manifest, files, target, loose=target == root)
    show_manifest(manifest, target, json_output=json_output)


def _manifest_of(folder: Path) -> Manifest | None:
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
    return held.manifest


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


def _manifest(kind: str, name: str, files: Mapping[str, Path]) -> Manifest:
    try:
        msgspec.convert(name, ManifestName)
        for component in name.split("/"):
            safe_filename(component)
    except (msgspec.ValidationError, InvalidManifestError):
        fail(f"{name!r} is no name: give --name NAME, or OWNER/NAME, of at most 200 characters", code=2)
    entries = asyncio.run(_entries(files))
    manifest = msgspec.convert({"name": name, "kind": kind, "shards": msgspec.to_builtins(entries)}, Manifest)
    check_manifest(manifest)
    return manifest


async def _entries(files: Mapping[str, Path]) -> list[ShardEntry]:
    """Check and hash the files, in a process of its own: some damaged files end the one that reads them."""
    entries: list[ShardEntry] = []
    hasher, before = Hasher(), 0
    with bytes_progress() as progress:
        bar = progress.add_task("", total=sum(file.stat().st_size for file in files.values()))
        try:
            for shard_id, (filename, file) in enumerate(files.items()):
                progress.update(bar, description=f"hashing {shard_id + 1}/{len(files)}")
                kind = kind_of(file)
                content = (await hasher.hash(file, kind, progress=partial(_show, progress, bar, before))).content
                entry = ShardEntry(
                    shard_id=shard_id, filename=filename, size=content.size, content_id=content.content_id, kind=kind
                )
                shard_path(file.parent, entry)
                entries.append(entry)
                before += content.size
                progress.update(bar, completed=before)
        except FileChangedError:
            fail(f"{file} is being written to; publish it when it is whole")
        finally:
            await hasher.close()
    return entries


def _show(progress: Progress, bar: TaskID, before: int, done: int) -> None:
    progress.update(bar, completed=before + done)


def _place_all(manifest: Manifest, files: Mapping[str, Path], target: Path, *, loose: bool = False) -> None:
    """Put the files and, unless they are loose, their manifest into `target`; nothing where something is in the way.

    The manifest comes first, so that a daemon which looks meanwhile knows what the files are.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {target}: {error.strerror}")
    if not loose and (there := _manifest_of_another(target, manifest)):
        fail(f"{target} holds another {there}: publish under another name, or remove that folder first")
    missing = [entry.filename for entry in manifest.shards if not _is_there(entry, files, target)]
    if not loose:
        body = json.dumps({"manifest": msgspec.to_builtins(manifest)}, indent=1)
        _write(target / MANIFEST_FILENAME, body)
    for filename in missing:
        _place(files[filename], target / filename)


def _manifest_of_another(target: Path, manifest: Manifest) -> str | None:
    path = target / MANIFEST_FILENAME
    if not path.exists():
        return None
    held = read_manifest(path, SigningKey.generate())
    if held is not None and held.digest == manifest.digest:
        return None
    return "manifest" if held is None else f"{held.manifest.kind} {held.manifest.name}@{held.digest[:12]}"


def _is_there(entry: ShardEntry, files: Mapping[str, Path], target: Path) -> bool:
    """Whether the file is in place already. Fails where another is."""
    path = target / entry.filename
    if not path.exists():
        return False
    if path.samefile(files[entry.filename]):
        return True
    if path.is_file() and path.stat().st_size == entry.size and hash_file(path).content_id == entry.content_id:
        return True
    return fail(f"{path} is there already, and is another file: evict it, or publish under another name")


def _place(file: Path, target: Path) -> None:
    source = file.resolve()  # a link to a link would be published as a link
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.rename(target)
    except OSError as error:
        fail(f"cannot put {file} at {target}: {error.strerror}")
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
