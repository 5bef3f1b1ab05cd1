"""The metadata of files: formats, several records of a file, names that two files have."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pyarrow.parquet
import pytest

from protocol.errors import InvalidParamsError
from torch_bridge.batches.metadata import MetadataOf, read_table
from torch_bridge.batches.plan import RemoteFile


def test_tables_of_every_kind() -> None:
    rows = [{"file_name": "a.mp4", "text": "one"}, {"file_name": "b/c.mp4", "text": "two"}]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["file_name", "text"])
    writer.writeheader()
    writer.writerows(rows)
    packed = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), packed)
    kinds = {
        "m.json": b'[{"file_name": "a.mp4", "text": "one"}, {"file_name": "b/c.mp4", "text": "two"}]',
        "m.jsonl": b'{"file_name": "a.mp4", "text": "one"}\n\n{"file_name": "b/c.mp4", "text": "two"}\n',
        "m.csv": text.getvalue().encode(),
        "m.parquet": packed.getvalue(),
    }
    for name, data in kinds.items():
        assert read_table(name, data) == {"a.mp4": rows[0], "b/c.mp4": rows[1]}, name
    assert read_table("m.json", b'{"a.mp4": "one"}') == {"a.mp4": "one"}
    assert read_table("m.csv", b"clip,text\na,one\n", "clip") == {"a": {"clip": "a", "text": "one"}}
    for name, data in {"m.txt": b"", "m.json": b"{", "m.jsonl": b'{"text": "one"}', "m.parquet": b"PAR1"}.items():
        with pytest.raises(InvalidParamsError, match="metadata="):
            read_table(name, data)


def test_several_records_of_a_file_are_a_list_or_an_error_and_never_the_last_of_them() -> None:
    lines = [json.dumps({"file_name": f"{n // 2}.mp4", "question": n}) for n in range(60)]
    data = "\n".join(lines).encode()
    found = read_table("m.jsonl", data, how="list")
    assert [record["question"] for records in found.values() for record in records] == list(range(60))
    assert [len(records) for records in found.values()] == [2] * 30
    with pytest.raises(InvalidParamsError, match=r"record 1 is the second of '0.mp4'.*metadata_records='list'"):
        read_table("m.jsonl", data)
    with pytest.raises(InvalidParamsError, match="'one' or 'list'"):
        MetadataOf("m.jsonl", None, "all")  # type: ignore[arg-type]


def test_metadata_of_one_of_two_files_of_a_name_is_refused_not_guessed() -> None:
    table = MetadataOf({"x/a.mp4": 1, "y/a.mp4": 2, "y/b.mp4": 3, "y/b.srt": 4})
    table.load(None, Path())  # type: ignore[arg-type]
    assert [table(RemoteFile(key, 1)) for key in ("x/a.mp4", "y/a.mp4", "b.mp4")] == [1, 2, 3]
    with pytest.raises(InvalidParamsError, match=r"z/a.mp4 has the metadata of x/a.mp4 or of y/a.mp4"):
        table(RemoteFile("z/a.mp4", 1))
    with pytest.raises(InvalidParamsError, match=r"b.jpg has the metadata of y/b.mp4 or of y/b.srt"):
        table(RemoteFile("b.jpg", 1))


def test_metadata_is_found_by_key_then_name_then_stem() -> None:
    files = [RemoteFile(key, 1) for key in ("x/a.mp4", "y/a.mp4", "z/b.mp4", "c.mp4")]
    table = MetadataOf({"x/a.mp4": 1, "a.mp4": 2, "b": 3})
    table.load(None, Path())  # type: ignore[arg-type]
    assert [table(file) for file in files] == [1, 2, 3, None]
    assert MetadataOf(len)(files[3]) == 5
    assert MetadataOf(None)(files[0]) is None
