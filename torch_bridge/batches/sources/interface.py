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
        """Whether files come well only one by one in the order of `list`, as out of a compressed tar."""

    def list(self, notes: Path) -> Sequence[RemoteFile]:
        """All files. `notes` is a folder of this machine where a source may keep what was dear to find out.

        Raises OriginError and the like.
        """

    def fetch(self, file: RemoteFile, target: Path, *, stop: threading.Event, on_bytes: OnBytes) -> Path:
        """Bring a file here and say where it is: at `target`, or where the source itself keeps it. It is there whole or
        not at all; `target` with `.part` behind its name is what a fetch that was broken off may go on with.

        Raises OriginNotFoundError where it has vanished, OriginCorruptError where it is another than it was listed,
        CancelledRequestError where `stop` was set, OSError of the disk, OriginError and the like else.
        """

    def release(self, file: RemoteFile) -> None:
        """A file that the source keeps itself is not needed any more; one at `target` is deleted by who gave that."""

    def read(self, key: str) -> bytes:
        """A small file, in memory: metadata."""


def vanished(error: Exception) -> bool:
    """Whether a file is not there any more."""
    return isinstance(error, OriginNotFoundError | ShardNotFoundError)
