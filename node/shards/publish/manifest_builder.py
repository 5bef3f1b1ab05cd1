"""Makes the manifest of what is published: one file, several with a name, or a folder that has a manifest already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from protocol.structs import prepared

OnHashed = Callable[[int, int, int], None]
"""Called with the shard's number, the bytes of its file that are hashed, and those of the files before it."""


@dataclass(frozen=True)
class Publication:
    """What is to be published."""

    manifest: Manifest
    files: Mapping[str, Path]
    """By file name."""
    hashed: Mapping[ContentId, Hashed]
    """The files as they were when they were hashed, by content; those that were."""
    origins: tuple[str, ...] = ()
    """The URLs at which the files are already, as the manifest says."""


def read_publication(folder: Path, name: str | None) -> Publication | None:
    """The publication of a folder made by `split`, or by an earlier `publish`; nothing is hashed.

    None if the folder has no manifest. Raises InvalidShardError if files are missing, InvalidParamsError if the
    manifest has another name than `name`.
    """
    path = folder / MANIFEST_FILENAME
    if not path.is_file():
        return None
    signed = read_manifest(path, SigningKey.generate())
    if signed is None:
        return None
    publication = publication_of(folder, signed.manifest, signed.origins)
    if name is not None and name != signed.manifest.name:
        raise InvalidParamsError(f"{folder} has a manifest, with the name {signed.manifest.name!r}: leave the name out")
    return publication


def publication_of(folder: Path, manifest: Manifest, origins: tuple[str, ...] = ()) -> Publication:
    """The files of a manifest in a folder, compared by size alone. Raises InvalidShardError if one differs."""
    check_name(manifest.name)
    for entry in manifest.shards:
        file = shard_path(folder, entry)
        size = file.stat().st_size if file.is_file() else None
        if size != entry.size:
            found = "is not there" if size is None else f"has {size} bytes"
            raise InvalidShardError(f"{file} {found}, its manifest says {entry.size} bytes; make the manifest again")
    return Publication(manifest, {entry.filename: folder / entry.filename for entry in manifest.shards}, {}, origins)


def list_publishable(paths: Sequence[Path], on_skipped: Callable[[Path, list[str]], None]) -> dict[str, Path]:
    """The files by their names, in the order of the names; `on_skipped` is called with folders within a folder.

    Raises InvalidShardError if two files have one name, or there is none.
    """
    files: dict[str, Path] = {}
    for file in (file for path in paths for file in _list(path, on_skipped)):
        other = files.setdefault(file.name, file)
        if other.resolve() != file.resolve():
            raise InvalidShardError(
                f"{other} and {file} have one name: rename one of them, a data set has each name once"
            )
    if not files:
        raise InvalidShardError(f"nothing to publish in {', '.join(map(str, paths))}: no file there")
    return dict(sorted(files.items()))


def _list(path: Path, on_skipped: Callable[[Path, list[str]], None]) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    visible = [item for item in path.iterdir() if not item.name.startswith(".")]
    if skipped := sorted(item.name for item in visible if item.is_dir()):
        on_skipped(path, skipped)
    yield from (item for item in visible if item.is_file())


def check_name(name: str) -> None:
    """Raise InvalidParamsError for a name by which no node could ask."""
    try:
        msgspec.convert(name, prepared(ManifestName))
        for component in name.split("/"):
            safe_filename(component)
    except (msgspec.ValidationError, InvalidManifestError):
        raise InvalidParamsError(
            f"{name!r} cannot be a name: give another one, NAME or OWNER/NAME, of at most 200 characters"
        ) from None
    if split_name(name)[1]:
        raise InvalidParamsError(
            f"{name!r} would be read as a digest, or as a name with a digest behind its @, and never be found: "
            "give another name"
        )


async def build_manifest(
    name: str | None, files: Mapping[str, Path], hasher: Hasher, on_hashed: OnHashed
) -> Publication:
    """Check and hash the files, in a process of their own, and make their manifest: that of a data set `name`, or of
    one loose file if `name` is None.

    Raises InvalidParamsError for a name that cannot be one, InvalidShardError, OSError.
    """
    check_name(next(iter(files)) if name is None else name)
    entries: list[ShardEntry] = []
    by_content: dict[ContentId, Hashed] = {}
    before = 0
    for shard_id, (filename, file) in enumerate(files.items()):
        hashed = await _hash(hasher, file, kind_of(file), shard_id, before, on_hashed)
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
    fields = {
        "name": next(iter(files)) if name is None else name,
        "kind": "file" if name is None else "dataset",
        "shards": msgspec.to_builtins(entries),
    }
    manifest = msgspec.convert(fields, prepared(Manifest))
    check_manifest(manifest)
    return Publication(manifest, files, by_content)


async def hash_missing(
    publication: Publication, entries: Sequence[ShardEntry], hasher: Hasher, on_hashed: OnHashed
) -> Publication:
    """Hash those files of the entries that are not hashed yet. Raises InvalidShardError if one has other content."""
    by_content, before = dict(publication.hashed), 0
    for entry in entries:
        file = publication.files[entry.filename]
        if entry.content_id not in by_content:
            hashed = await _hash(hasher, file, entry.kind, entry.shard_id, before, on_hashed)
            if hashed.content.content_id != entry.content_id:
                raise InvalidShardError(
                    f"{file} has content {hashed.content.content_id}, its manifest says {entry.content_id}: make the "
                    "manifest again, or remove it and publish the files as they are"
                )
            by_content[entry.content_id] = hashed
        before += entry.size
    return replace(publication, hashed=by_content)


async def _hash(hasher: Hasher, file: Path, kind: ShardKind, shard_id: int, before: int, on_hashed: OnHashed) -> Hashed:
    """Hash a file to which no other process writes. Raises InvalidShardError, OSError."""
    try:
        hashed = await hasher.hash(file, kind, progress=lambda done: on_hashed(shard_id, done, before))
    except FileChangedError:
        raise InvalidShardError(f"{file} is being written to: publish it when it is whole") from None
    on_hashed(shard_id, hashed.content.size, before)
    return hashed
