"""`split` and `publish`: make shards out of files, for a daemon to seed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from node.cli.console import bytes_progress, fail, human_bytes, out, print_json
from node.config import load_settings
from node.formats.kinds import check_shard, kind_of
from node.formats.split import split_gguf
from protocol.content import hash_file
from protocol.errors import InvalidShardError
from protocol.manifest import MANIFEST_FILENAME, Manifest, ShardEntry, check_manifest, safe_filename


def split(
    model_gguf: Annotated[Path, typer.Argument(metavar="MODEL.gguf", exists=True, dir_okay=False)],
    dir_out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Made where missing.")],
    *,
    shards: Annotated[int | None, typer.Option(help="How many, about equal in bytes.", min=1)] = None,
    shard_size: Annotated[str | None, typer.Option(help="At most this large each: 256MiB.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model. Default: the one in the file.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Cut a GGUF into shards that stock llama.cpp opens, each a contiguous run of layers.

    Writes shard-0.gguf ... and manifest.json. A daemon with the folder inside its shards folder signs and announces
    it.

    Example: python -m node split model.gguf --out ~/.local/share/shoal/shards/model --shards 3
    """
    if (shards is None) == (shard_size is None):
        fail("give either --shards N or --shard-size BYTES", code=2)
    shard_bytes = None if shard_size is None else _byte_size(shard_size)
    with bytes_progress() as progress:
        bar = progress.add_task(f"cutting {model_gguf.name}", total=model_gguf.stat().st_size)
        manifest = split_gguf(
            model_gguf,
            dir_out,
            shards=shards,
            shard_bytes=shard_bytes,
            name=model,
            progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    _show(manifest, dir_out, json_output)


def publish(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", exists=True)],
    *,
    name: Annotated[str | None, typer.Option(help="Of the data set; a folder's own name unless given.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="The daemon's.")] = None,
    shards_dir: Annotated[Path | None, typer.Option(help="The daemon's shards folder.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Put files into the shards folder, where the daemon picks them up, seeds and announces them.

    One file without --name is a loose file, found by its file name. Several files, a folder, or any with --name are
    a data set. A folder made by `split` is a model, and keeps its manifest. Files are linked where the disk is the
    same (do not change them in place afterwards), copied otherwise.

    Example: python -m node publish train/*.parquet --name fineweb-edu
    """
    settings = load_settings(data_dir=data_dir, shards_dir=shards_dir)
    files = sorted({file.resolve() for path in paths for file in _files_of(path)})
    if not files:
        fail(f"nothing to publish in {', '.join(map(str, paths))}: no file there")
    if len(paths) == 1 and (paths[0] / MANIFEST_FILENAME).is_file():
        target = settings.shards_dir / (name or paths[0].resolve().name)
        for file in files:
            _place(file, target / file.name)
        out.print(f"model folder placed at {target}")
        return
    if len(files) == 1 and name is None and paths[0].is_file():
        manifest, target = _manifest("file", files[0].name, files), settings.shards_dir
    else:
        name = name or (paths[0].resolve().name if len(paths) == 1 else None)
        if name is None:
            fail("several paths need a --name for the data set that they become", code=2)
        manifest, target = _manifest("dataset", name, files), settings.shards_dir / name.replace("/", "--")
    for entry, file in zip(manifest.shards, files, strict=True):
        _place(file, target / entry.filename)
    if manifest.kind != "file":
        body = json.dumps({"manifest": msgspec.to_builtins(manifest)}, indent=1)
        _write(target / MANIFEST_FILENAME, body)
    _show(manifest, target, json_output)


def _files_of(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for file in path.iterdir():
        if file.is_file() and not file.name.startswith("."):
            yield file


def _manifest(kind: str, name: str, files: list[Path]) -> Manifest:
    entries = []
    with bytes_progress() as progress:
        for shard_id, file in enumerate(files):
            safe_filename(file.name)
            check_shard(file)
            bar = progress.add_task(f"hashing {file.name}", total=file.stat().st_size)
            try:
                found = hash_file(file, lambda done, bar=bar: progress.update(bar, completed=done))  # type: ignore[misc]
            except ValueError as error:
                raise InvalidShardError(f"cannot publish {file}: {error}") from None
            entries.append(
                ShardEntry(
                    shard_id=shard_id,
                    filename=file.name,
                    size=found.size,
                    content_id=found.content_id,
                    kind=kind_of(file),
                )
            )
    manifest = msgspec.convert({"name": name, "kind": kind, "shards": msgspec.to_builtins(entries)}, Manifest)
    check_manifest(manifest)
    return manifest


def _place(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if target.samefile(file):
            return
        fail(f"{target} is there already; evict it first, or publish under another --name")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copyfile(file, temporary)
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.rename(path)


def _byte_size(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        fail(f"{text!r} is not a size; write it as 256MiB, 2GB or a number of bytes", code=2)


def _show(manifest: Manifest, folder: Path, json_output: bool) -> None:
    if json_output:
        print_json({"digest": manifest.digest, "folder": str(folder), "manifest": manifest})
        return
    for entry in manifest.shards:
        layers = "" if entry.end_layer is None else f"  layers [{entry.start_layer}, {entry.end_layer})"
        out.print(f"  {entry.shard_id:>4}  {entry.filename}  {human_bytes(entry.size)}{layers}", markup=False)
    out.print(
        f"{manifest.kind} {manifest.name}: {len(manifest.shards)} shards, {human_bytes(manifest.total_bytes)}, "
        f"in {folder}",
        markup=False,
    )
    out.print(f"{manifest.name}@{manifest.digest}", markup=False, soft_wrap=True)
