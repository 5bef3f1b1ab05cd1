"""FileSource: where the files of a StreamingBatchDataset come from, as the parts above see it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from protocol.errors import OriginNotFoundError, ShardNotFoundError
from torch_bridge.batches.plan import RemoteFile
from torch_bridge.batches.sources.range_file import OnBytes


class FileSource(Protocol):
    """Files under one name. Thread-safe; travels to other processes by fork and by pickle."""

    @property
    def name(self) -> str:
        """As it may be shown."""

    @property
    def in_order(self) -> bool:
        """Whether files are cheap only one by one in the order of `list`, as out of a compressed tar."""

    def list(self, notes: Path) -> Sequence[RemoteFile]:
        """All files. `notes` is a folder of this machine where a source may keep what took long to find out.

        Raises OriginError, UnreachableError.
        """

    def fetch(self, file: RemoteFile, target: Path, *, stop: threading.Event, on_bytes: OnBytes) -> Path:
        """Bring a file here. Returns where it is: at `target`, or where the source itself keeps it. It is complete or
        absent; `target` with `.part` behind its name holds the bytes of an interrupted fetch, to be continued.

        Raises OriginNotFoundError if it has vanished, OriginCorruptError if it is another one than was listed,
        CancelledRequestError if `stop` was set, OSError of the disk, or another OriginError.
        """

    def release(self, file: RemoteFile) -> None:
        """A file that the source keeps itself is not needed any more. The caller deletes one at `target`."""

    def read(self, key: str) -> bytes:
        """A small file, in memory: metadata."""


def vanished(error: Exception) -> bool:
    """Whether an error says that a file is gone."""
    return isinstance(error, OriginNotFoundError | ShardNotFoundError)
