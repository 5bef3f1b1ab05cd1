"""Puts published files into the shards folder of a daemon: links if it can, copies if it must.

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

from node.files import TEMPORARY_SUFFIX, atomic_file, atomic_write, replace_file
from node.shards.store.listing import LOOSE_KINDS
from node.shards.store.manifests import folder_names, read_manifest, write_manifest
from protocol.errors import InvalidParamsError, InvalidShardError
from protocol.manifest import MANIFEST_FILENAME, Manifest, ShardEntry, SignedManifest
from protocol.signing import SigningKey

IsSame = Callable[[Path, ShardEntry], bool]
"""Whether a file that is in place already, and has the shard's size, is the shard."""


def target_folder(manifest: Manifest, root: Path, *, keep_manifest: bool) -> tuple[Path, bool]:
    """The folder under the shards folder `root` for what is published, and whether it is loose: without a manifest.

    `keep_manifest`: the manifest has to lie beside its files, since it says more than they do.
    """
    if manifest.kind != "file":
        return root / manifest.name.replace("/", "--"), False
    if manifest.shards[0].kind in LOOSE_KINDS.values() and not keep_manifest:
        return root, True
    # A daemon shares a loose file that is neither GGUF nor parquet only if a manifest names it.
    return root / folder_names(manifest.name, manifest.digest)[0], False


def place_files(
    manifest: Manifest,
    files: Mapping[str, Path],
    target: Path,
    signed: SignedManifest | None,
    *,
    loose: bool,
    is_same: IsSame,
    follow_links: bool = True,
) -> None:
    """Put the files and, unless they are loose, their manifest into `target`; none if one cannot have its place.

    The manifest comes first, so that a daemon which looks meanwhile knows what the files are. Raises
    InvalidParamsError if another file or manifest has the place, InvalidShardError for a link if links are not
    followed, OSError.
    """
    target.mkdir(parents=True, exist_ok=True)
    present = None if loose else manifest_at(target, manifest)
    missing = [entry.filename for entry in manifest.shards if not _is_placed(entry, files, target, is_same)]
    if signed is not None:
        write_manifest(target, signed)
    elif not loose and present is None:
        body = json.dumps({"manifest": msgspec.to_builtins(manifest)}, indent=1)
        atomic_write(target / MANIFEST_FILENAME, body)
    for filename in missing:
        _place(files[filename], target / filename, follow_links=follow_links)


def manifest_at(target: Path, manifest: Manifest) -> SignedManifest | None:
    """The same manifest, if it is in `target` already. Raises InvalidParamsError if another one is."""
    path = target / MANIFEST_FILENAME
    if not path.exists():
        return None
    present = read_manifest(path, SigningKey.generate())
    if present is not None and present.digest == manifest.digest:
        return present
    other = "manifest" if present is None else f"{present.manifest.kind} {present.manifest.name}@{present.digest[:12]}"
    raise InvalidParamsError(f"{target} has another {other}: publish under another name, or remove that folder first")


def _is_placed(entry: ShardEntry, files: Mapping[str, Path], target: Path, is_same: IsSame) -> bool:
    """Whether the file is in place already. Raises InvalidParamsError if another one is."""
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
    linked = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        try:
            os.link(source, linked, follow_symlinks=False)
        except OSError:
            _copy(source, target)
            return
        if not stat.S_ISREG(linked.lstat().st_mode):
            raise InvalidShardError(f"{file} is not a regular file any more")
        replace_file(linked, target)
    except OSError as error:
        raise OSError(error.errno, f"cannot be put at {target}: {error.strerror}", str(file)) from None
    finally:
        linked.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidShardError(f"{source} is not a regular file")
        with atomic_file(target) as out:
            shutil.copyfileobj(file, out, 1 << 20)
