"""What lies in the shards folder, and what each file is: a shard of a manifest, or a loose one.

`list_files` reads the disk and decides nothing; `classify` decides and reads nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from node.files import UNFINISHED_SUFFIXES, Fingerprint
from node.shards.store.manifests import LocalManifest
from protocol.manifest import MANIFEST_FILENAME, Shard, ShardKind

log = logging.getLogger(__name__)

MAX_DEPTH = 8
"""Folders below the shards folder."""
MAX_FILES = 200_000
LOOSE_KINDS: Mapping[str, ShardKind] = {".gguf": "gguf", ".parquet": "parquet"}
"""Suffixes that make a file a shard though no manifest names it."""


Listing = Mapping[Path, Mapping[str, Fingerprint]]
"""Folder -> file name -> fingerprint."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that is to be shared, as the disk has it."""

    path: Path
    fingerprint: Fingerprint
    kind: ShardKind
    shard: Shard | None
    """None for a loose file."""


def list_files(root: Path, max_depth: int = MAX_DEPTH, max_files: int = MAX_FILES) -> Listing:
    """List the regular files under `root` that are neither hidden nor unfinished.

    A link to a folder is not followed, and a link to a file counts only if it stays within `root`. Folders that
    cannot be read are skipped, and so is what lies deeper than `max_depth` or comes after `max_files`.
    """
    listing: dict[Path, dict[str, Fingerprint]] = {}
    pending = [(root, 0)]
    count = 0
    while pending:
        folder, depth = pending.pop()
        files: dict[str, Fingerprint] = {}
        for item in _items(folder):
            if item.is_dir(follow_symlinks=False):
                if depth < max_depth:
                    pending.append((Path(item.path), depth + 1))
                continue
            if item.name.lower().endswith(UNFINISHED_SUFFIXES):
                continue
            if item.is_symlink() and not _within(Path(item.path), root):
                continue
            if fingerprint := Fingerprint.of(Path(item.path)):
                files[item.name] = fingerprint
                count += 1
        if files:
            listing[folder] = files
        if count > max_files:
            log.warning("%s holds more than %d files: the rest is left alone", root, max_files)
            break
    return listing


def _items(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            yield from sorted((item for item in items if not item.name.startswith(".")), key=lambda item: item.name)
    except OSError as err:
        log.warning("cannot read the folder %s: %s", folder, err.strerror)


def _within(link: Path, root: Path) -> bool:
    try:
        return link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return False


def classify(listing: Listing, manifests: Mapping[Path, LocalManifest]) -> dict[Path, FoundFile]:
    """Say which of the listed files are shards; `manifests` has the manifest of each folder that has one."""
    found: dict[Path, FoundFile] = {}
    for folder, files in listing.items():
        held = manifests.get(folder)
        for name, fingerprint in files.items():
            path = folder / name
            entry = held.entries.get(name) if held else None
            if held and entry:
                found[path] = FoundFile(path, fingerprint, entry.kind, Shard(held.signed, entry))
            elif name != MANIFEST_FILENAME and (kind := LOOSE_KINDS.get(path.suffix.lower())):
                found[path] = FoundFile(path, fingerprint, kind, None)
    return found
