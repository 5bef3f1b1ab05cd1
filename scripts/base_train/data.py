"""The data of a base_train run: its source, the shards that it needs, its loaders."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyarrow import ArrowException, parquet

from node.files import replace_file
from protocol.errors import InvalidShardError
from protocol.manifest import ShardEntry
from scripts.base_train import corpus as text_corpus
from scripts.base_train import tokenizer as byte_tokenizer
from scripts.base_train.settings import Settings, expected_tokens, shards_needed
from torch_bridge.core.ranks import Ranks
from torch_bridge.shards.sources.factory import open_source
from torch_bridge.shards.sources.interface import ShardSource
from torch_bridge.shards.sources.subset import ShardSubset
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.settings import Buffering, Ordering
from torch_bridge.streaming.text_loader import TextLoader

_DOCUMENTS = 8
"""That are tokenised together, at most."""
_TURNS = 64
"""So many turns at least an epoch has for ranks to take, if it has as many documents. It does not depend on the
number of ranks: another one goes on in the same order."""
_WINDOW = 1024
"""Documents that are mixed with each other, at most."""


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    where: str
    """For people."""
    shards: tuple[str, ...]
    """File names of those that are trained on."""
    validation: str
    expected_tokens: int
    """Of the shards that are trained on."""
    documents: StreamingShardDataset
    training: TextLoader
    evaluation: TextLoader
    """Begins at the same batch each time that it is iterated."""


def made_corpus(settings: Settings) -> tuple[str, str | None, Path]:
    """A data set for a run without one: where it is, its name, and the folder that its shards are fetched to.

    It has --streaming_total_shards shards, which together have the tokens that the run needs, and one for validation;
    what an earlier run made of the same size is used again.
    """
    shards = settings.streaming_total_shards + 1
    shard_bytes = max(4000, int(settings.tokens * 1.1) // settings.streaming_total_shards)
    made = settings.folder / f"python-library-{shards}x{min(shard_bytes, text_corpus.MAX_SHARD_BYTES)}"
    if not made.is_dir():
        settings.folder.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix="new-", dir=settings.folder))
        paths = text_corpus.write_shards(new / "parquet", shards=shards, shard_bytes=shard_bytes)
        text_corpus.publish_to(f"file://{(new / 'origin').resolve()}", paths)
        try:
            replace_file(new, made)
        except OSError:  # another run made it meanwhile
            shutil.rmtree(new)
    if not settings.streaming_mode:
        return str(made / "parquet"), None, made / "readers"
    return f"file://{(made / 'origin').resolve()}", text_corpus.NAME, made / "window"


def opened(settings: Settings, ranks: Ranks) -> Data:
    """Raises ShoalError if the source, its data set or a shard is not there, or has no two shards."""
    if settings.source is None:
        where, dataset, folder = made_corpus(settings)
        told = f"text of Python's own library, made in {folder.parent}"
    else:
        where, dataset, folder = settings.source, settings.dataset, settings.folder / "window"
        told = where if dataset is None else f"{dataset} from {where}"
    source = open_source(where, dataset, folder=folder)
    entries = sorted(source.manifest().shards, key=lambda entry: entry.filename)
    if len(entries) < 2:
        raise InvalidShardError(f"{told} has {len(entries)} shard; it takes two: the last one is for validation")
    *training, validation = entries
    expected = _expected(source, validation, training, settings.column)
    count = shards_needed(expected, settings.tokens, settings.streaming_total_shards)
    names = [entry.filename for entry in training[:count]]
    rows = [entry.rows or _WINDOW for entry in training[:count]]
    mixed = min(_WINDOW, *rows)
    ahead = settings.streaming_buffer_size if settings.streaming_mode else len(names)
    documents = StreamingShardDataset(
        ShardSubset(source, [*names, validation.filename]),
        batch_size=max(1, min(_DOCUMENTS, sum(rows) // _TURNS)),
        seed=settings.seed,
        columns=[settings.column],
        validation_shard=validation.filename,
        ordering=Ordering(lanes=1, window=max(mixed, 1)),
        buffering=Buffering(buffer_size=ahead),
        ranks=ranks,
        run=settings.run,
    )
    unshuffled = StreamingShardDataset(
        ShardSubset(source, [validation.filename]),
        batch_size=1,
        columns=[settings.column],
        ordering=Ordering(shuffle=False, lanes=1),
        buffering=Buffering(keep_behind=1),
        ranks=ranks,
        run=f"{settings.run}-validation",
    )
    return Data(
        told,
        tuple(names),
        validation.filename,
        sum(expected[:count]),
        documents,
        _loader(documents, settings),
        _loader(unshuffled, settings),
    )


def _loader(documents: StreamingShardDataset, settings: Settings) -> TextLoader:
    return TextLoader(
        documents,
        byte_tokenizer.tokenise,
        bos=byte_tokenizer.BOS,
        batch_rows=settings.device_batch_size,
        row_tokens=settings.max_seq_len,
        column=settings.column,
    )


def _expected(source: ShardSource, measured: ShardEntry, others: Sequence[ShardEntry], column: str) -> list[int]:
    """The tokens of each of `others`, from those of the first row group of `measured`."""
    path = source.fetch(measured).path
    try:
        with parquet.ParquetFile(path) as file:
            rows = file.metadata.num_rows
            texts = [text for text in file.read_row_group(0, columns=[column])[column].to_pylist() if text is not None]
            sampled = file.metadata.row_group(0).num_rows
    except (ArrowException, OSError, KeyError) as err:
        raise InvalidShardError(f"no text could be read of column {column!r} of {measured.filename}: {err}") from None
    per_row = sum(len(tokens) + 1 for tokens in byte_tokenizer.tokenise(texts)) / max(sampled, 1)
    per_byte = per_row * rows / measured.size
    return [expected_tokens(entry, per_row, per_byte) for entry in others]
