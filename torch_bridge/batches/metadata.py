"""Captions and other metadata: loaded once on a machine, found by a file's key, name, or name without ending."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from node.files import atomic_write
from protocol.errors import InvalidParamsError
from torch_bridge.batches.plan import RemoteFile
from torch_bridge.batches.sources.interface import FileSource

NAME_COLUMNS = ("file_name", "filename", "file", "key", "path", "name", "id")
"""The fields of a record that may name its file; the first that exists does."""
Metadata = str | Mapping[str, Any] | Callable[[str], Any] | None
"""A key at the source (.json, .jsonl, .csv, .parquet), a dict, or a function of a file's key."""
Records = Literal["one", "list"]
"""Whether a file has one record, or a list of them."""


class MetadataOf:
    """Called with a file, it returns the file's metadata; None if there is none."""

    def __init__(self, metadata: Metadata, column: str | None = None, records: Records = "one") -> None:
        """`column`: the field of a record that names its file; else the first of NAME_COLUMNS."""
        if records not in ("one", "list"):
            raise InvalidParamsError(f"metadata_records is 'one' or 'list', not {records!r}")
        self._records = records
        self.at_source = metadata if isinstance(metadata, str) else None
        self._column = column
        self._ask = metadata if callable(metadata) else None
        self._table: dict[str, Any] | None = dict(metadata) if isinstance(metadata, Mapping) else None
        self._by_name: dict[str, str | tuple[str, str]] = {}
        """The table's key by name, and by name without ending; two keys if more than one has it."""
        self._indexed = False

    def load(self, source: FileSource, notes: Path) -> None:
        """Read it into memory: from the source once, from the folder `notes` in the other processes of the machine.

        Raises InvalidParamsError for another kind of file, or records that name no file.
        """
        if self.at_source is not None and self._table is None:
            kept = notes / f"metadata-{hashlib.sha256(self.at_source.encode()).hexdigest()[:24]}"
            if not kept.exists():
                atomic_write(kept, source.read(self.at_source))
            self._table = read_table(self.at_source, kept.read_bytes(), self._column, self._records)
        if self._table is not None and not self._indexed:
            for key in self._table:
                path = PurePosixPath(key)
                for name in {path.name, path.stem} - self._table.keys():
                    first = self._by_name.setdefault(name, key)
                    if first != key:
                        self._by_name[name] = (first if isinstance(first, str) else first[0], key)
            self._indexed = True

    def __call__(self, file: RemoteFile) -> Any:
        if self._ask is not None:
            return self._ask(file.key)
        if self._table is None:
            return None
        path = PurePosixPath(file.key)
        for name in (file.key, path.name, path.stem):
            if name in self._table:
                return self._table[name]
            found = self._by_name.get(name)
            if isinstance(found, tuple):
                raise InvalidParamsError(
                    f"{file.key} has the metadata of {found[0]} or of {found[1]}: name files in the metadata by their "
                    "whole key"
                )
            if found is not None:
                return self._table[found]
        return None


def read_table(name: str, data: bytes, column: str | None = None, how: Records = "one") -> dict[str, Any]:
    """Metadata by file name, out of a file whose ending says what it is: a record, or a list of them.

    Raises InvalidParamsError for another kind of file, records that name no file, and, if each file has `one`, for two
    records of a file.
    """
    ending = PurePosixPath(name).suffix.lower()
    records: Any
    try:
        if ending == ".json":
            records = json.loads(data)
            if isinstance(records, dict):
                return records
        elif ending in (".jsonl", ".ndjson"):
            records = [json.loads(line) for line in data.splitlines() if line.strip()]
        elif ending in (".csv", ".tsv"):
            text = io.StringIO(data.decode("utf-8-sig"), newline="")
            records = list(csv.DictReader(text, delimiter="\t" if ending == ".tsv" else ","))
        elif ending == ".parquet":
            import pyarrow.parquet

            records = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        else:
            raise InvalidParamsError(f"metadata={name!r}: its name must end in .json, .jsonl, .csv, .tsv or .parquet")
    except (ValueError, OSError) as error:
        raise InvalidParamsError(f"metadata={name!r} cannot be read as {ending}: {error}") from error
    table: dict[str, Any] = {}
    for number, record in enumerate(records):
        fields = (column,) if column else NAME_COLUMNS
        named = next((one for one in fields if isinstance(record, dict) and record.get(one)), None)
        if named is None:
            raise InvalidParamsError(
                f"metadata={name!r}: record {number} names no file in {', '.join(fields)}: give metadata_column="
            )
        if how == "list":
            table.setdefault(str(record[named]), []).append(record)
        elif table.setdefault(str(record[named]), record) is not record:
            raise InvalidParamsError(
                f"metadata={name!r}: record {number} is the second of {record[named]!r}: metadata_records='list' gives "
                "each file the list of its records"
            )
    return table
