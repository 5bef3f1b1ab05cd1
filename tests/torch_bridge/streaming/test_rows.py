"""Row groups of any size are decoded once, in pieces, and what is kept of them follows from what is still needed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import InvalidParamsError, InvalidShardError
from tests.support.bridge.shards import file_at_whose_footer_pyarrow_aborts
from torch_bridge.shards.sources.local import LocalSource
from torch_bridge.streaming import rows as rows_module
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.order import RowSpan
from torch_bridge.streaming.rows import ShardDecoder
from torch_bridge.streaming.schema import DataColumns
from torch_bridge.streaming.settings import Ordering


def written(path: Path, rows: int, group: int, width: int = 0) -> Path:
    table = pa.table({"id": range(rows)} | ({"text": ["t" * width] * rows} if width else {}))
    pq.write_table(table, path, row_group_size=group, use_dictionary=False)
    return path


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 120), st.integers(1, 50), st.data())
def test_pieces_come_in_any_order_whatever_the_row_groups(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, size: int, data: st.DataObject
) -> None:
    path = written(tmp_path_factory.mktemp("rows") / "a.parquet", rows, group)
    every = [RowSpan(first, min(size, rows - first), 0, first // size) for first in range(0, rows, size)]
    wanted = data.draw(st.lists(st.sampled_from(every), unique=True))
    decoder = ShardDecoder(path, DataColumns(None), wanted, rows=rows)
    for piece in data.draw(st.permutations(wanted)):
        assert decoder.take(piece)["id"].to_pylist() == list(range(piece.first_row, piece.first_row + piece.rows))
    assert decoder.size_bytes == 0
    decoder.close()


def test_what_is_not_wanted_is_not_kept_and_what_is_taken_goes(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", 100_000, 10_000)
    wanted = [RowSpan(first, 100, 0, first) for first in range(0, 100_000, 10_000)]
    decoder = ShardDecoder(path, DataColumns(None), wanted)
    before = pa.total_allocated_bytes()
    assert decoder.take(wanted[-1])["id"].to_pylist()[0] == 90_000
    assert decoder.size_bytes == pytest.approx(9 * 100 * 8, rel=0.05)
    assert pa.total_allocated_bytes() - before < 300_000, "and nothing of the 800,000 that lay between them"
    decoder.take(wanted[0])
    assert decoder.size_bytes == pytest.approx(8 * 100 * 8, rel=0.05)
    with pytest.raises(KeyError, match="taken already"):
        decoder.take(wanted[0])


def test_a_large_row_group_is_read_a_little_at_a_time(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(80_000_000)  # which no compression makes smaller
    rows = pa.array([noise[at : at + 1000] for at in range(0, len(noise), 1000)])
    pq.write_table(pa.table({"x": rows}), tmp_path / "a.parquet", use_dictionary=False, row_group_size=len(rows))
    decoder = ShardDecoder(tmp_path / "a.parquet", DataColumns(None), [RowSpan(100, 100, 0, 0)])
    before = pa.total_allocated_bytes()
    assert decoder.take(RowSpan(100, 100, 0, 0))["x"][0].as_py() == noise[100_000:101_000]
    assert pa.total_allocated_bytes() - before < 16_000_000
    decoder.close()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each row group of each file is decoded."""
    counts: Counter[tuple[str, int]] = Counter()

    class Counting(pq.ParquetFile):  # type: ignore[misc]
        def __init__(self, path: Path, **options: Any) -> None:
            super().__init__(path, **options)
            self.name = path.name

        def iter_batches(self, *, row_groups: list[int], **options: Any) -> Any:
            counts.update((self.name, group) for group in row_groups)
            return super().iter_batches(row_groups=row_groups, **options)

    monkeypatch.setattr(rows_module.pq, "ParquetFile", Counting)
    return counts


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("group", [100, 1_000, 4_000])
def test_each_row_group_is_decoded_once_an_epoch(
    tmp_path: Path, decoded: Counter[tuple[str, int]], group: int, shuffle: bool
) -> None:
    for shard in range(3):
        written(tmp_path / f"shard_{shard:05d}.parquet", 4_000, group, width=50)
    ordering = Ordering(shuffle=shuffle, lanes=4, block_rows=32, window=128)
    data = StreamingShardDataset(LocalSource(tmp_path), batch_size=16, ordering=ordering)
    seen = [int(sample) for batch in data for sample in batch["id"]]
    assert sorted(seen) == sorted(list(range(4_000)) * 3)
    assert len(decoded) == 3 * -(-4_000 // group)
    assert set(decoded.values()) == {1}


def test_memory_is_that_of_windows_and_not_that_of_row_groups(tmp_path: Path) -> None:
    for shard in range(2):
        written(tmp_path / f"shard_{shard:05d}.parquet", 40_000, 40_000, width=500)  # 20 MB a group
    ordering = Ordering(lanes=4, block_rows=32, window=128)
    data = StreamingShardDataset(LocalSource(tmp_path), batch_size=16, ordering=ordering)
    before, most = pa.total_allocated_bytes(), 0
    for batch in data:
        assert len(batch["text"]) <= 16
        most = max(most, pa.total_allocated_bytes() - before)
    windows = 4 * 128 * 508
    assert most < 3 * windows + 2 * 2 * rows_module._DECODED_AT_ONCE


def test_windows_are_smaller_for_larger_samples() -> None:
    assert Ordering().fitted(300) == (1024, 8192)
    assert Ordering().fitted(100_000) == (20, 160)
    assert Ordering().fitted(1e12) == (1, 1)
    assert Ordering(window=64).fitted(1e12) == (8, 64)
    assert Ordering(block_rows=7).fitted(300) == (7, 8192)


def test_a_footer_at_which_pyarrow_aborts_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path, rows = file_at_whose_footer_pyarrow_aborts(tmp_path / "a.parquet"), RowSpan(0, 3, 0, 0)
    with pytest.raises(InvalidShardError, match=r"a\.parquet cannot be read"):
        ShardDecoder(path, DataColumns(None), [rows]).take(rows)
    assert ShardDecoder(path, DataColumns(["id"]), [rows]).take(rows)["id"].to_pylist() == [1, 2, 3]


@pytest.mark.parametrize("damage", ["footer", "rows", "page"])
def test_a_damaged_file_and_another_row_count_are_named(tmp_path: Path, damage: str) -> None:
    path = written(tmp_path / "a.parquet", 1_000, 500, width=40)
    raw = bytearray(path.read_bytes())
    at = {"footer": len(raw) - 6, "page": 40, "rows": 0}[damage]
    if at:
        raw[at : at + 30] = bytes(255 - byte for byte in raw[at : at + 30])
        path.write_bytes(raw)
    with pytest.raises(InvalidShardError, match=r"a\.parquet"):
        ShardDecoder(path, DataColumns(None), [RowSpan(0, 1_000, 0, 0)], rows=999 if damage == "rows" else 1_000).take(
            RowSpan(0, 1_000, 0, 0)
        )


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", 10, 5)
    with pytest.raises(InvalidParamsError, match=r"a\.parquet has no column 'label'; it has id"):
        ShardDecoder(path, DataColumns(["label"]), [])


def test_more_than_2_gib_of_text_in_a_row_group_is_read_in_slices(tmp_path: Path) -> None:
    """Strings of one Arrow array end at 2 GiB. What matters here is that no slice is as large as its group."""
    path = written(tmp_path / "a.parquet", 20_000, 20_000, width=5_000)
    largest = 0
    decoder = ShardDecoder(path, DataColumns(None), [RowSpan(first, 500, 0, first) for first in range(0, 20_000, 500)])
    for first in range(0, 20_000, 500):
        table = decoder.take(RowSpan(first, 500, 0, first))
        largest = max(largest, *(chunk.nbytes for chunk in table["text"].chunks))
        assert table["text"].type == pa.large_string()
    assert largest < 2 * rows_module._DECODED_AT_ONCE
