"""Cuts a GGUF into shards with a manifest: all of it, or nothing.

Everything is written under temporary names in the target folder, flushed to the disk, and renamed when it is
complete; the manifest comes last. The bytes depend on the source and the cuts alone: two machines that cut the same
file with the same version get the same content ids, and so share one swarm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from node.formats.cuts import Cuttable, cuttable
from node.formats.gguf import read_gguf
from node.formats.gguf_file import GgufFile
from node.formats.gguf_writer import GgufPlan, write_gguf
from node.formats.slices import SHARD_INDEX, plan_slice
from node.formats.target import SplitTarget
from protocol.content import hash_file
from protocol.errors import IllegalCutError, InvalidParamsError, InvalidShardError
from protocol.manifest import MANIFEST_FILENAME, Manifest, ModelInfo, ShardEntry, check_manifest, readable_name
from protocol.structs import prepared

OnProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total); every shard byte counts twice, as it is written and as it is hashed."""


def split_gguf(
    source: Path,
    out_dir: Path,
    *,
    shards: int | None = None,
    shard_bytes: int | None = None,
    cuts: Sequence[int] | None = None,
    name: str | None = None,
    progress: OnProgress | None = None,
) -> Manifest:
    """Cut the model at `source` into `out_dir`/shard-0.gguf ... and write the manifest beside them; returns it.

    Exactly one of `shards` (that many, even by the bytes of their layers), `shard_bytes` (as few as are each at
    most that large) and `cuts` (before exactly these layers) is given. `name` is by default made from the model's
    `general.name`, else from the file's name. Memory stays bounded by the header, not by the model.

    The folder may hold an earlier cut of the same model, which is replaced; any other file that is named like a shard
    is an error. Files of other names are not touched. Holds the GIL while it hashes: run it in a process
    or thread of its own.

    Raises InvalidShardError (the source is not a complete GGUF), IllegalCutError (`details.legal`),
    InvalidParamsError (also for a folder that holds something else), InsufficientDiskError, and OSError.
    """
    if sum(option is not None for option in (shards, shard_bytes, cuts)) != 1:
        raise InvalidParamsError("give exactly one of: a number of shards, a shard size, or the layers to cut before")
    gguf = read_gguf(source)
    _check_whole(gguf)
    model = cuttable(gguf)
    if shards is not None:
        boundaries = model.even(shards)
    elif shard_bytes is not None:
        boundaries = _boundaries_below(gguf, model, shard_bytes)
    else:
        boundaries = model.at(list(cuts or ()))
    plans = _plans(gguf, model, boundaries)
    info = model_info(gguf, model)
    manifest_name = default_name(gguf) if name is None else name
    _check_name(manifest_name)
    return _write(gguf, plans, boundaries, manifest_name, info, Path(out_dir), progress)


def default_name(gguf: GgufFile) -> str:
    """A model's name for commands and folders: letters and digits of every script, dots, dashes and underscores."""
    texts = (gguf.text("general.name") or "", gguf.path.stem)
    return next((name for text in texts if (name := readable_name(text, "-"))), "model")


def model_info(gguf: GgufFile, model: Cuttable) -> ModelInfo:
    """What a planner needs to know. Raises InvalidShardError if the header lacks it."""
    arch, name = gguf.architecture, gguf.path.name
    n_embd = gguf.integer(f"{arch}.embedding_length")
    context = gguf.integer(f"{arch}.context_length")
    if not n_embd or not context:
        raise InvalidShardError(f"{name} does not say its {arch}.embedding_length and {arch}.context_length")
    heads = max(gguf.layer_integers(f"{arch}.attention.head_count", model.n_layers) or (0,))
    heads_kv = max(gguf.layer_integers(f"{arch}.attention.head_count_kv", model.n_layers) or (heads,))
    key = gguf.integer(f"{arch}.attention.key_length") or (n_embd // heads if heads else 0)
    value = gguf.integer(f"{arch}.attention.value_length") or (n_embd // heads if heads else 0)
    if gguf.integer(f"{arch}.attention.key_length_mla"):
        value = 0  # latent attention: llama.cpp keeps one compressed row, and no values
    values = {
        "architecture": arch,
        "n_layers": model.n_layers,
        "n_embd": n_embd,
        "context_length": context,
        "kv_bytes_per_token_layer": 2 * heads_kv * (key + value),
    }
    try:
        return msgspec.convert(values, prepared(ModelInfo))
    except msgspec.ValidationError as err:
        raise InvalidShardError(f"{name} has impossible metadata: {err}") from None


def _check_whole(gguf: GgufFile) -> None:
    parts = gguf.integer("split.count")
    if parts and parts > 1:
        raise InvalidShardError(
            f"{gguf.path.name} is one of {parts} parts of llama.cpp's gguf-split: join them with "
            f"`llama-gguf-split --merge` and cut the result"
        )
    if gguf.integer(SHARD_INDEX) is not None:
        raise InvalidShardError(f"{gguf.path.name} is itself a shard of a model: cut the whole model instead")


def _check_name(name: str) -> None:
    shard = {"shard_id": 0, "filename": "x", "size": 1, "content_id": "0" * 64, "kind": "file"}
    sample = {"name": name, "kind": "file", "shards": [shard]}
    try:
        msgspec.convert(sample, prepared(Manifest))
    except msgspec.ValidationError as err:
        raise InvalidParamsError(f"{name!r} cannot be a model's name (`name` or `owner/name`): {err}") from None


def _plans(gguf: GgufFile, model: Cuttable, boundaries: tuple[int, ...]) -> list[GgufPlan]:
    count = len(boundaries) - 1
    return [plan_slice(gguf, model.rule, model.n_layers, boundaries, index) for index in range(count)]


def _boundaries_below(gguf: GgufFile, model: Cuttable, shard_bytes: int) -> tuple[int, ...]:
    """The fewest even parts of which none is larger than `shard_bytes`."""
    if shard_bytes < 1:
        raise InvalidParamsError(f"shard size {shard_bytes} is not above 0 bytes: give a size such as 256MiB")
    finest = len(model.legal) + 1
    least = _largest(gguf, model, model.even(finest))
    if least <= shard_bytes:
        for shards in range(min(max(1, sum(model.layer_bytes) // shard_bytes), finest), finest + 1):
            with contextlib.suppress(IllegalCutError):  # this number may make a slice of a length that is refused
                boundaries = model.even(shards)
                if _largest(gguf, model, boundaries) <= shard_bytes:
                    return boundaries
    reason = f" ({model.reason})" if model.reason else ""
    raise IllegalCutError(
        f"{gguf.path.name} cannot be cut into shards of at most {shard_bytes} bytes: cut before every legal layer its "
        f"largest shard has {least}{reason}; allow that size",
        {"legal": list(model.legal), "least_shard_bytes": least},
    )


def _largest(gguf: GgufFile, model: Cuttable, boundaries: tuple[int, ...]) -> int:
    return max(plan.size for plan in _plans(gguf, model, boundaries))


def _write(
    gguf: GgufFile,
    plans: list[GgufPlan],
    boundaries: tuple[int, ...],
    name: str,
    info: ModelInfo,
    out_dir: Path,
    progress: OnProgress | None,
) -> Manifest:
    total = 2 * sum(plan.size for plan in plans)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    with SplitTarget.open(out_dir, gguf, sum(plan.size for plan in plans)) as target, gguf.path.open("rb") as source:
        entries: list[ShardEntry] = []
        for index, plan in enumerate(plans):
            filename = f"shard-{index}.gguf"
            with target.create(filename) as out:
                write_gguf(plan, source, out, advance)
            hashed = hash_file(target.temporary(filename))
            if hashed.size != plan.size:
                raise InvalidShardError(f"{filename} came out with {hashed.size} bytes instead of {plan.size}")
            advance(plan.size)
            entries.append(
                ShardEntry(
                    shard_id=index,
                    filename=filename,
                    size=hashed.size,
                    content_id=hashed.content_id,
                    kind="gguf",
                    start_layer=boundaries[index],
                    end_layer=boundaries[index + 1],
                )
            )
        manifest = Manifest(name=name, kind="model", shards=tuple(entries), model=info)
        check_manifest(manifest)
        with target.create(MANIFEST_FILENAME) as out:
            out.write(msgspec.json.format(msgspec.json.encode({"manifest": manifest}), indent=2) + b"\n")
        target.commit([entry.filename for entry in entries], MANIFEST_FILENAME)
    return manifest
