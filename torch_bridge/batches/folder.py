"""The cache folder: which consumer has which part of it, and which files are complete in it.

lock                         held for moments: the folder's layout, a listing, metadata
layout.json                  for how many consumers of this machine it is divided
notes/                       notes of sources, and metadata
epochs/00000002/listing.json the files of an epoch, the same for all consumers
epochs/00000002/c001.jsonl   the files that a consumer used in it; before.jsonl: those of another number of consumers
c001/lock                    held by the consumer that runs
c001/progress.json           its position
c001/files/IDENTITY/NAME     complete files, and NAME.part of others
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from node.files import TEMPORARY_SUFFIX, Durability, FileLock, atomic_write, is_held_here
from protocol.errors import BusyError, InsufficientDiskError, InvalidParamsError, ShoalError
from torch_bridge.batches.plan import Consumer, RemoteFile
from torch_bridge.core.closing import wait_for_others
from torch_bridge.core.folders import writing_to

_log = logging.getLogger(__name__)

LOCK_WAIT_S = 30.0
"""A worker of the last epoch may be closing."""
_TELL_AFTER_S = 2.0
LISTING_WAIT_S = 6 * 3600.0
"""Listing a compressed tar reads all of it: 100 GB take hours. A lock ends with its holder."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._ -]")
_CONSUMER = re.compile(r"c(\d{3,})")


@contextmanager
def writing(what: object) -> Iterator[None]:
    """Raise InsufficientDiskError for a full disk, ShoalError for another OSError, with the path."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise ShoalError(f"{what} cannot be written: {error.strerror or error}") from error
        raise InsufficientDiskError(
            f"{what} cannot be written, the disk is full: make room, or lower cache_size or max_bytes; complete files "
            "are used again"
        ) from error


def write_json(path: Path, value: Any, durability: Durability = "contents") -> None:
    """Replace a file by one that holds `value`. Raises as `writing` does."""
    with writing(path):
        atomic_write(path, msgspec.json.encode(value), durability)


def read_json(path: Path) -> Any:
    """The value of a JSON file; None if there is none, or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


@contextmanager
def locked(path: Path, wait_s: float | None = None) -> Iterator[None]:
    """Hold a lock, which ends with its process. Raises BusyError if another one holds it for `wait_s` (LOCK_WAIT_S)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    _acquire(lock, path, LOCK_WAIT_S if wait_s is None else wait_s)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, path: Path, wait_s: float) -> None:
    silent_s = min(wait_s, _TELL_AFTER_S)
    try:
        lock.acquire(timeout_s=silent_s)
        return
    except TimeoutError:
        if wait_s > silent_s:
            _log.warning("waiting for %s, which another process holds: one that is closing, or another run", path)
    try:
        lock.acquire(timeout_s=wait_s - silent_s)
    except TimeoutError:
        raise BusyError(
            f"{path.parent} is in use by another run, which holds {path.name}: give each run a cache_dir of its own, "
            "or end the other one"
        ) from None


def _is_ours(name: str) -> bool:
    """Whether a data set keeps, and deletes, files under this name once it has divided the folder."""
    return name == "epochs" or _CONSUMER.fullmatch(name) is not None


def _is_home(path: Path) -> bool:
    """Whether a consumer made this folder: nothing else is in it."""
    known = ("lock", "files", "progress.json")
    return path.is_dir() and all(one.name in known or one.name.endswith(TEMPORARY_SUFFIX) for one in path.iterdir())


class ConsumerFolder:
    """One consumer's part of the folder, while it runs."""

    def __init__(self, root: Path, consumer: Consumer, used_for: Mapping[str, str | int]) -> None:
        """`used_for`: source and seed; a folder that was used for others is refused."""
        self.root = root
        self._used_for = dict(used_for)
        self.consumer = consumer
        self.home = root / f"c{consumer.local_index:03d}"
        self.files = self.home / "files"
        self.notes = root / "notes"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold this part. Raises BusyError if another run holds it, or one with another number of consumers holds any;
        InvalidParamsError if the folder belongs to another data set, or cannot be written.
        """
        with ExitStack() as stack:
            with writing_to(self.root, "cache_dir"):
                self.notes.mkdir(parents=True, exist_ok=True)
                with self.common_lock():
                    self._divide()
                    self._leave_garbage()
                    stack.enter_context(locked(self.home / "lock"))
                self.files.mkdir(exist_ok=True)
            yield

    def _leave_garbage(self) -> None:
        """End an iteration of this process that is garbage. Raises BusyError for one that is open: it would not end
        while this one waits for it.
        """
        if is_held_here(self.home / "lock"):
            gc.collect()
            wait_for_others(LOCK_WAIT_S)
            if is_held_here(self.home / "lock"):
                raise BusyError(
                    f"this process has an iteration open that uses {self.home}: delete its iterator (`del`) before the "
                    "next one begins, or give the second data set a cache_dir of its own"
                )

    def common_lock(self) -> AbstractContextManager[None]:
        """The lock of the whole folder; listing a large origin or an archive holds it for long."""
        return locked(self.root / "lock", wait_s=LISTING_WAIT_S)

    def _divide(self) -> None:
        """If the folder was divided for another number of consumers, delete all files: the parts have other sizes now,
        and old and new ones together may be more than the disk may hold. The journals of the epochs stay.
        """
        layout = self.root / "layout.json"
        known = read_json(layout)
        if not layout.exists() and (others := sorted(path.name for path in self.root.iterdir() if _is_ours(path.name))):
            raise InvalidParamsError(
                f"{self.root} has {others[0]!r} and no layout.json: it was not made by a StreamingBatchDataset, which "
                "would delete that; give it a cache_dir of its own"
            )
        if isinstance(known, dict) and known.get("used_for") != self._used_for:
            raise InvalidParamsError(
                f"{self.root} was used for {known.get('used_for')}, and this run is for {self._used_for}: give it a "
                "cache_dir of its own, or delete this one"
            )
        if isinstance(known, dict) and known.get("consumers") == self.consumer.local_count:
            return
        homes = [path for path in self.root.iterdir() if _CONSUMER.fullmatch(path.name) and _is_home(path)]
        epochs = [value["epoch"] for path in homes if isinstance(value := read_json(path / "progress.json"), dict)]
        first = min(epochs, default=(known or {}).get("first_epoch", 0))
        for path in homes:
            with locked(path / "lock"):
                shutil.rmtree(path)
        for epoch in (self.root / "epochs").glob("*"):
            # Each consumer starts its own journal again, with its own part, which is another now.
            journals = sorted(epoch.glob("c*.jsonl"))
            lines = b"\n".join(path.read_bytes() for path in [*epoch.glob("before.jsonl"), *journals])
            atomic_write(epoch / "before.jsonl", lines)
            for path in journals:
                path.unlink()
        write_json(layout, {"consumers": self.consumer.local_count, "first_epoch": first, "used_for": self._used_for})

    def path_of(self, file: RemoteFile) -> Path:
        """The path of a file. Its name is the last part of its key, in safe characters: no key leads elsewhere."""
        name = _UNSAFE.sub("_", PurePosixPath(file.key).name)[-100:].lstrip(".")
        return self.files / file.identity / (name or "file")

    def complete(self, file: RemoteFile) -> Path | None:
        """The path of a file that is here and complete: only then it has its name."""
        path = self.path_of(file)
        with suppress(OSError):
            if path.stat().st_size == file.size:
                return path
        return None

    def keep_only(self, files: set[str]) -> None:
        """Delete all files, complete or not, but those of these identities."""
        for path in self.files.iterdir():
            if path.name not in files:
                shutil.rmtree(path)

    def delete(self, file: RemoteFile) -> None:
        """Delete a file; does nothing if there is none."""
        shutil.rmtree(self.files / file.identity, ignore_errors=True)
