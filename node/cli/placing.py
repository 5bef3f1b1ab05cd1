"""Puts published files into the shards folder of a daemon: links where it can, copies where it must."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from node.cli.console import fail
from node.shards.holding import Holding, read_manifest, write_manifest
from protocol.content import hash_file
from protocol.manifest import MANIFEST_FILENAME, Manifest, ShardEntry, SignedManifest
from protocol.signing import SigningKey


def place_all(
    manifest: Manifest,
    files: Mapping[str, Path],
    target: Path,
    signed: SignedManifest | None,
    *,
    loose: bool = False,
) -> None:
    """Put the files and, unless they are loose, their manifest into `target`; nothing where something is in the way.

    The manifest comes first, so that a daemon which looks meanwhile knows what the files are.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {target}: {error.strerror}")
    held = None if loose else held_at(target, manifest)
    missing = [entry.filename for entry in manifest.shards if not _is_there(entry, files, target)]
    if signed is not None:
        write_manifest(target, signed)
    elif not loose and held is None:
        body = json.dumps({"manifest": msgspec.to_builtins(manifest)}, indent=1)
        _write(target / MANIFEST_FILENAME, body)
    for filename in missing:
        _place(files[filename], target / filename)


def held_at(target: Path, manifest: Manifest) -> Holding | None:
    """The same manifest, where it lies there already. Fails where another one does."""
    path = target / MANIFEST_FILENAME
    if not path.exists():
        return None
    held = read_manifest(path, SigningKey.generate())
    if held is not None and held.digest == manifest.digest:
        return held
    there = "manifest" if held is None else f"{held.manifest.kind} {held.manifest.name}@{held.digest[:12]}"
    return fail(f"{target} holds another {there}: publish under another name, or remove that folder first")


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
