"""TextLoader: every token once, no padding, and the same batches from any state that it yielded."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from protocol.errors import InvalidParamsError
from torch_bridge import Ranks
from torch_bridge.shards.sources.local import LocalSource
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.settings import Ordering
from torch_bridge.streaming.text_loader import TextLoader

BOS = 256
WORDS = [f"{number} says " + "x" * (number * 37 % 90) for number in range(120)]


def as_bytes(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(4):
        texts = WORDS[shard * 30 : shard * 30 + 30]
        pq.write_table(pa.table({"text": [None, *texts]}), tmp_path / f"shard_{shard:05d}.parquet", row_group_size=7)
    return tmp_path


def loader(
    folder: Path, *, epochs: int | None = 2, tokenise: Any = as_bytes, shape: tuple[int, int] = (3, 50), **more: Any
) -> TextLoader:
    ordering = Ordering(lanes=2, block_rows=10, window=24)
    data = StreamingShardDataset(LocalSource(folder), batch_size=8, columns=["text"], ordering=ordering, **more)
    return TextLoader(data, tokenise, bos=BOS, batch_rows=shape[0], row_tokens=shape[1], epochs=epochs)


def taken(batches: Any) -> list[tuple[list[list[int]], list[list[int]]]]:
    return [(inputs.tolist(), targets.tolist()) for inputs, targets, _ in batches]


def documents(batches: Any) -> list[str]:
    """What lies between BOS and BOS; the last, which may be cut, is left out."""
    run = [token for inputs, _, _ in batches for token in inputs.flatten().tolist()]
    starts = [place for place, token in enumerate(run) if token == BOS]
    return [bytes(run[start + 1 : end]).decode() for start, end in itertools.pairwise(starts)]


def test_each_document_once_an_epoch_behind_one_bos_and_no_padding(folder: Path) -> None:
    batches = list(loader(folder, epochs=1))
    whole = sum(len(text.encode()) + 1 for text in WORDS)
    assert len(batches) == (whole - 1) // 150
    found = documents(batches)
    assert len(found) == len(set(found)) > 110
    assert set(found) <= set(WORDS)
    assert found != WORDS[: len(found)]
    inputs, targets, _ = batches[0]
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (3, 50)


def test_targets_are_one_token_ahead_across_rows_and_batches(folder: Path) -> None:
    batches = list(loader(folder))
    inputs = torch.cat([inputs.flatten() for inputs, _, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets, _ in batches])
    assert torch.equal(inputs[1:], targets[:-1])


def test_the_second_epoch_has_another_order(folder: Path) -> None:
    found = documents(loader(folder))
    assert len(set(found)) == len(WORDS)
    assert found[: len(WORDS)] != found[len(WORDS) :]


def test_continued_at_any_batch(folder: Path) -> None:
    batches = list(loader(folder))
    expected = taken(batches)
    for done, (_, _, state) in enumerate(batches, 1):
        again = loader(folder)
        again.load_state_dict(json.loads(json.dumps(state)))
        assert taken(itertools.islice(again, 3)) == expected[done : done + 3]
    again = loader(folder)
    again.load_state_dict(batches[3][2])
    assert taken(again) == expected[4:]


def test_continued_twice_from_states_of_a_continued_loader(folder: Path) -> None:
    expected = taken(loader(folder))
    first = list(itertools.islice(loader(folder), 7))
    second = loader(folder)
    second.load_state_dict(first[-1][2])
    middle = list(itertools.islice(second, 1))
    third = loader(folder)
    third.load_state_dict(middle[-1][2])
    assert taken(first) + taken(middle) + taken(third) == expected


def test_ranks_share_the_documents_and_continue_each_from_its_own_state(folder: Path) -> None:
    found: list[str] = []
    for rank in range(2):
        mine = {"ranks": Ranks(rank, 2, 0, 1)}
        batches = list(loader(folder, epochs=1, **mine))
        found += documents(batches)
        again = loader(folder, epochs=1, **mine)
        again.load_state_dict(batches[2][2])
        assert taken(again) == taken(batches)[3:]
    assert len(found) == len(set(found)) > 100


def numbered(texts: list[str]) -> list[list[int]]:
    """Tokens that no other document has."""
    return [[1000 + int(text.split()[0]) * 1000 + place for place in range(len(text))] for text in texts]


def ran(folder: Path, ranks: int, states: list[Any] | None, steps: int | None, epochs: int) -> tuple[list[int], Any]:
    """The tokens that ranks read, and the states of their last step. The next rank takes as many steps more, as where
    documents are of very different lengths; None: each to its end.
    """
    loaders = [
        loader(folder, epochs=epochs, tokenise=numbered, shape=(1, 7), ranks=Ranks(rank, ranks, 0, 1))
        for rank in range(ranks)
    ]
    found: list[int] = []
    last = []
    for rank, each in enumerate(loaders, 1):
        if states is not None:
            each.load_state_dicts(states)
        batches = list(itertools.islice(each, steps and steps * rank))
        found += [token for inputs, _, _ in batches for token in inputs.flatten().tolist()]
        last.append(json.loads(json.dumps(batches[-1][2])))
    return found, last


@pytest.mark.parametrize(
    ("ranks", "steps"),
    [
        ([2, 1], [90]),
        ([1, 2], [333]),
        ([4, 2], [7]),
        ([2, 3, 1], [130, 60]),
        ([3, 2, 2, 4, 1], [80, 1, 1, 20]),
        ([4, 2], [110]),
        ([2, 3, 2], [390, 1]),
    ],
)
def test_another_number_of_ranks_reads_exactly_what_is_left(folder: Path, ranks: list[int], steps: list[int]) -> None:
    epochs = 2
    whole = {token for tokens in numbered(WORDS) for token in tokens}
    states, read = None, []
    for number, step in zip(ranks, [*steps, None], strict=True):
        found, states = ran(folder, number, states, step, epochs)
        read += found
    times = Counter(read)
    counts = {token: times[token] for token in whole}
    assert max(counts.values()) <= epochs
    missing = sum(epochs - count for count in counts.values())
    assert missing <= ranks[-1] * 7, "what fills no batch at the very end"


def test_states_of_other_ranks_are_refused_where_one_is_missing(folder: Path) -> None:
    _, states = ran(folder, 3, None, 5, 1)
    with pytest.raises(InvalidParamsError, match="state 0 of 2 is rank 0's of 3: give those of all"):
        loader(folder).load_state_dicts(states[::2])


def test_another_rank_or_number_of_ranks_cannot_continue(folder: Path) -> None:
    _, _, state = next(iter(loader(folder, ranks=Ranks(0, 2, 0, 1))))
    for rank, ranks in ((1, 2), (0, 1)):
        other = loader(folder, ranks=Ranks(rank, ranks, 0, 1))
        with pytest.raises(InvalidParamsError, match="rank 0's of 2"):
            other.load_state_dict(state)


def test_another_tokeniser_cannot_continue(folder: Path) -> None:
    _, _, state = next(iter(loader(folder)))
    again = loader(folder, tokenise=lambda texts: [list(text.upper().encode()) for text in texts])
    again.load_state_dict(state)
    with pytest.raises(InvalidParamsError, match="the same tokeniser"):
        next(iter(again))


def test_a_rank_without_documents_says_so(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["only one"]}), tmp_path / "shard_00000.parquet")
    with pytest.raises(InvalidParamsError, match="no text for rank 1 of 2"):
        next(iter(loader(tmp_path, epochs=None, ranks=Ranks(1, 2, 0, 1))))


def test_a_column_that_is_not_there_is_named(folder: Path) -> None:
    data = StreamingShardDataset(LocalSource(folder), batch_size=8)
    with pytest.raises(InvalidParamsError, match="no column 'txt'; it has text"):
        next(iter(TextLoader(data, as_bytes, bos=BOS, batch_rows=1, row_tokens=8, column="txt")))
