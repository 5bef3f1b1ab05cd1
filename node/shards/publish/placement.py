"""Puts published files into the shards folder of a daemon: links where it can, copies where it must.

Every function blocks on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from node.shards.store.listing import LOOSE_KINDS
from node.shards.store.manifests import folder_names, read_manifest, write_manifest
from protocol.errors import InvalidParamsError, InvalidShardError
from protocol.manifest import MANIFEST_FILENAME, Manifest, ShardEntry, SignedManifest
from protocol.signing import SigningKey

IsSame = Callable[[Path, ShardEntry], bool]
"""Whether a file that is in place already, and has the shard's size, is the shard."""


def place_of(manifest: Manifest, root: Path, *, keep_manifest: bool) -> tuple[Path, bool]:
    """The folder under the shards folder `root` for what is published, and whether it lies there loose.

    `keep_manifest`: it has to lie beside its files, since it says more than they do.
    """
    if manifest.kind != "file":
        return root / manifest.name.replace("/", "--"), False
    if manifest.shards[0].kind in LOOSE_KINDS.values() and not keep_manifest:
        return root, True
    # A daemon shares a loose file that is neither GGUF nor parquet only where a manifest names it.
    return root / folder_names(manifest.name, manifest.digest)[0], False


def place_all(
    manifest: Manifest,
    files: Mapping[str, Path],
    target: Path,
    signed: SignedManifest | None,
    *,
    loose: bool,
    is_same: IsSame,
    follow_links: bool = True,
) -> None:
    """Put the files and, unless they are loose, their manifest into `target`; nothing where something is in the way.

    The manifest comes first, so that a daemon which looks meanwhile knows what the files are. Raises
    InvalidParamsError for what is in the way, InvalidShardError for a link where links are not followed, OSError.
    """
    target.mkdir(parents=True, exist_ok=True)
    held = None if loose else held_at(target, manifest)
    missing = [entry.filename for entry in manifest.shards if not _is_there(entry, files, target, is_same)]
    if signed is not None:
        write_manifest(target, signed)
    elif not loose and held is None:
        body = json.dumps({"manifest": msgspec.to_builtins(manifest)}, indent=1)
        _write(target / MANIFEST_FILENAME, body)
    for filename in missing:
        _place(files[filename], target / filename, follow_links=follow_links)


def held_at(target: Path, manifest: Manifest) -> SignedManifest | None:
    """The same manifest, where it lies there already. Raises InvalidParamsError where another one does."""
    path = target / MANIFEST_FILENAME
    if not path.exists():
        return None
    held = read_manifest(path, SigningKey.generate())
    if held is not None and held.digest == manifest.digest:
        return held
    there = "manifest" if held is None else f"{held.manifest.kind} {held.manifest.name}@{held.digest[:12]}"
    raise InvalidParamsError(f"{target} holds another {there}: publish under another name, or remove that folder first")


def _is_there(entry: ShardEntry, files: Mapping[str, Path], target: Path, is_same: IsSame) -> bool:
    """Whether the file is in place already. Raises InvalidParamsError where another is."""
    path = target / entry.filename
    if not path.exists():
        return False
    if path.samefile(files[entry.filename]):
        return True
    if path.is_file() and path.stat().st_size == entry.size and is_same(path, entry):
        return True
    raise InvalidParamsError(f"{path} is there already, and is another file: evict it, or publish under another name")


def _place(file: Path, target: Path, *, follow_links: bool) -> None:
    source = file.resolve() if follow_links else file  # a link to a link would be published as a link
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(source, temporary, follow_symlinks=False)
        except OSError:
            _copy(source, temporary)
        if not stat.S_ISREG(temporary.lstat().st_mode):
            raise InvalidShardError(f"{file} is no regular file any more")
        temporary.rename(target)
    except OSError as error:
        raise OSError(error.errno, f"cannot be put at {target}: {error.strerror}", str(file)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file, target.open("wb") as out:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidShardError(f"{source} is no regular file")
        shutil.copyfileobj(file, out, 1 << 20)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
