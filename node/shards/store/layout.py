"""Folders and files that a fetch makes, moves or deletes. Every function blocks on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from node.files import Fingerprint, invalid_path, part_path, replace_file
from node.shards.store.manifests import LocalManifest, folder_names, read_manifest, write_manifest
from protocol.errors import InvalidManifestError, ShardNotFoundError
from protocol.manifest import MANIFEST_FILENAME, SignedManifest
from protocol.signing import SigningKey


def prepare_folder(root: Path, signed: SignedManifest, taken: Collection[Path]) -> LocalManifest:
    """Make, or find again, the folder under `root` for a fetched manifest, and write the manifest into it.

    Folders in `taken` are another manifest's.

    Raises InvalidManifestError if neither name is free or ours.
    """
    names = folder_names(signed.manifest.name, signed.digest)
    for name in names:
        folder = root / name
        if folder in taken:
            continue
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            continue
        if folder.resolve() != folder or not _is_free(folder, signed):
            continue
        fingerprint = Fingerprint.of(folder / MANIFEST_FILENAME)
        if fingerprint:
            return LocalManifest(folder, signed, fingerprint)
    raise InvalidManifestError(
        f"there is no place for {signed.manifest.name!r} under {root}: {' and '.join(names)} are something else; "
        "move one of them away"
    )


def _is_free(folder: Path, signed: SignedManifest) -> bool:
    """Whether the folder has this manifest, or had none and has it now."""
    path = folder / MANIFEST_FILENAME
    if not path.exists():
        write_manifest(folder, signed)
        return True
    try:
        found = read_manifest(path, SigningKey.generate())
    except InvalidManifestError:
        return False
    return found is not None and found.digest == signed.digest


def set_aside(path: Path) -> Path | None:
    """Make room at `path`: what lies there, and is not the shard that it should be, gets the suffix `.invalid`."""
    part = part_path(path)
    if part.is_symlink():
        part.unlink()
    if not path.is_symlink() and not path.exists():
        return None
    return replace_file(path, invalid_path(path))


def link_or_copy(source: Path, target: Path) -> None:
    """Have the bytes of `source` at `target` too: as a second name if the file system can, else as a copy.

    Raises ShardNotFoundError if `source` was deleted meanwhile, OSError.
    """
    set_aside(target)
    with suppress(OSError):
        os.link(source, target)
        return
    part = part_path(target)
    try:
        shutil.copyfile(source, part)
    except FileNotFoundError:
        raise ShardNotFoundError(f"{source.name} went away while it was copied; fetch it again") from None
    replace_file(part, target)


def remove_if_empty(folder: Path) -> bool:
    """Delete a fetched manifest's folder, unless something lies beside the manifest. Whether the manifest is gone."""
    with suppress(OSError):
        if all(name == MANIFEST_FILENAME for name in os.listdir(folder)):
            (folder / MANIFEST_FILENAME).unlink()
            folder.rmdir()
    return not (folder / MANIFEST_FILENAME).exists()
