"""Makes a manifest of files: of one, of several with a name, or of a folder that has its manifest already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from node.formats.kinds import kind_of
from node.shards.store.hasher import FileChangedError, Hashed, Hasher
from node.shards.store.manifests import read_manifest, shard_path
from protocol.errors import InvalidManifestError, InvalidParamsError, InvalidShardError
from protocol.ids import ContentId
from protocol.manifest import (
    MANIFEST_FILENAME,
    Manifest,
    ManifestName,
    ShardEntry,
    ShardKind,
    check_manifest,
    safe_filename,
    split_name,
)
from protocol.signing import SigningKey

OnHashed = Callable[[int, int, int], None]
"""Told of the shard, the bytes of its file that are hashed, and those of the files before it."""


@dataclass(frozen=True)
class Chosen:
    """What is to be published."""

    manifest: Manifest
    files: Mapping[str, Path]
    """By file name."""
    hashed: Mapping[ContentId, Hashed]
    """The files as they were when they were hashed, by content; those that were."""
    origins: tuple[str, ...] = ()
    """Where it lies already, as its manifest says."""


def held_in(folder: Path, name: str | None) -> Chosen | None:
    """What a folder made by `split`, or by an earlier `publish`, holds; nothing is hashed.

    Raises InvalidShardError where files lack, InvalidParamsError where the manifest has another name.
    """
    path = folder / MANIFEST_FILENAME
    if not path.is_file():
        return None
    held = read_manifest(path, SigningKey.generate())
    if held is None:
        return None
    chosen = of_manifest(folder, held.manifest, held.origins)
    if name is not None and name != held.manifest.name:
        raise InvalidParamsError(
            f"{folder} holds a manifest, which names it {held.manifest.name!r}: leave the name out"
        )
    return chosen


def of_manifest(folder: Path, manifest: Manifest, origins: tuple[str, ...] = ()) -> Chosen:
    """The files in a folder that a manifest names, by their sizes. Raises InvalidShardError where one lacks."""
    check_findable(manifest.name)
    for entry in manifest.shards:
        file = shard_path(folder, entry)
        found = file.stat().st_size if file.is_file() else None
        if found != entry.size:
            there = "is not there" if found is None else f"has {found} bytes"
            raise InvalidShardError(f"{file} {there}, its manifest says {entry.size} bytes; make the manifest again")
    return Chosen(manifest, {entry.filename: folder / entry.filename for entry in manifest.shards}, {}, origins)


def files_of(paths: Sequence[Path], on_left_out: Callable[[Path, list[str]], None]) -> dict[str, Path]:
    """The files by their names, in the order of the names; `on_left_out` is told of folders within a folder.

    Raises InvalidShardError where two have one name, or there is none.
    """
    files: dict[str, Path] = {}
    for file in (file for path in paths for file in _listed(path, on_left_out)):
        other = files.setdefault(file.name, file)
        if other.resolve() != file.resolve():
            raise InvalidShardError(
                f"{other} and {file} have one name: rename one of them, a data set has each name once"
            )
    if not files:
        raise InvalidShardError(f"nothing to publish in {', '.join(map(str, paths))}: no file there")
    return dict(sorted(files.items()))


def _listed(path: Path, on_left_out: Callable[[Path, list[str]], None]) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    inside = [item for item in path.iterdir() if not item.name.startswith(".")]
    if left_out := sorted(item.name for item in inside if item.is_dir()):
        on_left_out(path, left_out)
    yield from (item for item in inside if item.is_file())


def check_findable(name: str) -> None:
    """Raise InvalidParamsError for a name that nobody could ask for."""
    try:
        msgspec.convert(name, ManifestName)
        for component in name.split("/"):
            safe_filename(component)
    except (msgspec.ValidationError, InvalidManifestError):
        raise InvalidParamsError(
            f"{name!r} is no name: give another name, NAME or OWNER/NAME, of at most 200 characters"
        ) from None
    if split_name(name)[1]:
        raise InvalidParamsError(
            f"{name!r} would be read as a digest, or a name with one behind its @, and never be found: "
            "give another name"
        )


async def compose(name: str | None, files: Mapping[str, Path], hasher: Hasher, on_hashed: OnHashed) -> Chosen:
    """Check and hash the files, in a process of its own, and make their manifest: a data set's of that name, or a loose
    file's without one.

    Raises InvalidParamsError for a name that cannot be, InvalidShardError, OSError.
    """
    check_findable(next(iter(files)) if name is None else name)
    entries: list[ShardEntry] = []
    by_content: dict[ContentId, Hashed] = {}
    before = 0
    for shard_id, (filename, file) in enumerate(files.items()):
        hashed = await hash_quiet(hasher, file, kind_of(file), shard_id, before, on_hashed)
        content = hashed.content
        entry = ShardEntry(
            shard_id=shard_id,
            filename=filename,
            size=content.size,
            content_id=content.content_id,
            kind=kind_of(file),
            rows=hashed.rows,
        )
        shard_path(file.parent, entry)
        entries.append(entry)
        by_content[content.content_id] = hashed
        before += content.size
    found = {
        "name": next(iter(files)) if name is None else name,
        "kind": "file" if name is None else "dataset",
        "shards": msgspec.to_builtins(entries),
    }
    manifest = msgspec.convert(found, Manifest)
    check_manifest(manifest)
    return Chosen(manifest, files, by_content)


async def checked(chosen: Chosen, entries: Sequence[ShardEntry], hasher: Hasher, on_hashed: OnHashed) -> Chosen:
    """Hash those files of a manifest that are not hashed yet. Raises InvalidShardError where one is another."""
    by_content, before = dict(chosen.hashed), 0
    for entry in entries:
        file = chosen.files[entry.filename]
        if entry.content_id not in by_content:
            hashed = await hash_quiet(hasher, file, entry.kind, entry.shard_id, before, on_hashed)
            if hashed.content.content_id != entry.content_id:
                raise InvalidShardError(
                    f"{file} holds content {hashed.content.content_id}, its manifest says {entry.content_id}: make the "
                    "manifest again, or remove it and publish the files as they are"
                )
            by_content[entry.content_id] = hashed
        before += entry.size
    return Chosen(chosen.manifest, chosen.files, by_content, chosen.origins)


async def hash_quiet(
    hasher: Hasher, file: Path, kind: ShardKind, shard_id: int, before: int, on_hashed: OnHashed
) -> Hashed:
    """Hash a file that nobody writes to. Raises InvalidShardError, OSError."""
    try:
        hashed = await hasher.hash(file, kind, progress=lambda done: on_hashed(shard_id, done, before))
    except FileChangedError:
        raise InvalidShardError(f"{file} is being written to; publish it when it is whole") from None
    on_hashed(shard_id, hashed.content.size, before)
    return hashed
