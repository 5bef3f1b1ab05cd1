"""`split`: cut a model into shards."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from node.cli.console import bytes_progress, examples, fail, out, show_manifest
from node.cli.pull import DEFAULT_NODE
from node.formats.split import split_gguf

EXAMPLES = examples(
    "shoal split model.gguf --out ~/.local/share/shoal/shards/my-model --shards 3 --model my-model",
    "shoal split model.gguf --out shards --shard-size 512MiB --model llama-3.2",
)


def split(
    model_gguf: Annotated[
        Path, typer.Argument(metavar="MODEL.gguf", exists=True, dir_okay=False, help="The whole model, in one file.")
    ],
    dir_out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder for the shards, made if missing.")],
    *,
    shards: Annotated[int | None, typer.Option(metavar="N", help="How many, about equal in bytes.", min=1)] = None,
    shard_size: Annotated[
        str | None, typer.Option(metavar="BYTES", help="At most this large each: 256MiB, 2GB.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "--name", metavar="NAME", help="Name of the model. Default: the one in the file."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print digest, folder and manifest as JSON.")] = False,
) -> None:
    """Cut a GGUF into shards, each a run of layers.

    Writes shard-0.gguf ... and manifest.json; stock llama.cpp opens each shard. A daemon with the folder inside its
    shards folder signs and announces the model; `publish DIR` puts it there. Give --shards or --shard-size. The last
    line is the command that generates with the model, once a daemon has it.
    """
    if (shards is None) == (shard_size is None):
        fail("give either --shards N or --shard-size BYTES", code=2)
    shard_bytes = None if shard_size is None else _byte_size(shard_size)
    with bytes_progress() as progress:
        # Seen from its first bytes on: a cut that is refused has none.
        bar = progress.add_task(f"cutting {model_gguf.name}", total=model_gguf.stat().st_size, visible=False)
        manifest = split_gguf(
            model_gguf,
            dir_out,
            shards=shards,
            shard_bytes=shard_bytes,
            name=model,
            progress=lambda done, total: progress.update(bar, completed=done, total=total, visible=True),
        )
    show_manifest(manifest, dir_out, json_output=json_output)
    if not json_output:
        name = shlex.quote(manifest.name)
        out.print(f'shoal generate {DEFAULT_NODE} --model {name} --prompt "Hello"', markup=False, soft_wrap=True)


def _byte_size(text: str) -> int:
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0:
        fail(f"{text!r} is not a size; write it as 256MiB, 2GB or a number of bytes", code=2)
    return size
