"""The machine's ledger of readers: which process still needs which shard, so that no needed shard is deleted.

Each reader (a rank's worker) of a run has a file with the shards that it needs, and a lock that ends with its process.
The lock of the whole ledger is held by a process that decides, deletes, or needs more shards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import msgspec

from node.files import FileLock, atomic_write
from protocol.errors import ShardInUseError
from protocol.structs import prepared
from torch_bridge.core.closing import wait_for_others

LEAVING_S = 30.0
"""A reader of the same name may take so long to end: a DataLoader starts new workers before the old ones are gone, and
a worker whose training process was killed notices that only every 5 s, and finishes what it has begun.
"""


class ReaderState(msgspec.Struct, frozen=True, kw_only=True):
    """What one reader writes into the ledger."""

    expected: int
    """Readers of its run on this machine."""
    epoch: int
    remaining: tuple[str, ...]
    """File names of the shards of its epoch that it is not past."""
    held: tuple[str, ...]
    """Shards that it may read now: fetched or on their way, kept behind, pinned."""


def needed(runs: Mapping[str, Sequence[ReaderState]], registered: Mapping[str, int]) -> frozenset[str] | None:
    """The shards that may not be deleted, from the live readers of each run; None if nothing may be.

    Nothing may be deleted while a run waits for readers that have not registered. The readers that are furthest behind
    need the rest of their epoch; those already in a later epoch need the shards that they hold.
    """
    names: set[str] = set()
    for run, readers in runs.items():
        if readers and registered[run] < max(reader.expected for reader in readers):
            return None
        first = min((reader.epoch for reader in readers), default=0)
        for reader in readers:
            names.update(reader.held)
            if reader.epoch == first:
                names.update(reader.remaining)
    return frozenset(names)


def deletable(candidates: Iterable[str], needs: Collection[str] | None) -> list[str]:
    """The candidates that no reader needs."""
    return [] if needs is None else [name for name in candidates if name not in needs]


class ReaderLedger:
    """One reader's part in the ledger of a folder."""

    def __init__(
        self, folder: Path, run: str, reader: str, state: ReaderState | None = None, *, give_up_after_s: float = 600.0
    ) -> None:
        """Register a reader and its state. `give_up_after_s`: for so long the others wait for readers to register.

        Raises ShardInUseError if a living process is this reader already, OSError of the disk.
        """
        self._root = folder / ".readers"
        self._mine = self._root / quote(run, safe="") / quote(reader, safe="")
        self._lock = FileLock(self._mine.with_name(self._mine.name + ".lock"))
        self._give_up_after_s = give_up_after_s
        self._written: ReaderState | None = None
        self._threads = threading.RLock()
        self._inside = 0
        self._mine.parent.mkdir(parents=True, exist_ok=True)
        with self.alone():
            if not any(_is_held(path) for path in self._mine.parent.glob("*.lock")):
                kept = () if state is None else tuple(self._finished(state.epoch))
                for stale in self._mine.parent.iterdir():  # of an earlier start
                    if not stale.name.startswith(kept):
                        stale.unlink(missing_ok=True)
                self._mine.with_name("began").touch()
            if not self._lock.try_acquire():
                raise ShardInUseError(
                    f"another process reads as {reader!r} of run {run!r} in {folder}: give each its own "
                    "reader= (rank and worker), and each run its own (run=)"
                )
            if state is not None:
                try:
                    self.write(state)
                except OSError:
                    self._lock.release()
                    raise

    @classmethod
    def join(cls, folder: Path, run: str, reader: str, state: ReaderState) -> ReaderLedger:
        """The same, but waits for a reader of this name that the garbage collector ended and that is closing."""
        try:
            return cls(folder, run, reader, state)
        except ShardInUseError:
            wait_for_others(LEAVING_S)
            return cls(folder, run, reader, state)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of the ledger."""
        with self._threads:
            if self._inside:
                yield
                return
            with FileLock(self._root / "ledger.lock").held():
                self._inside += 1
                try:
                    yield
                finally:
                    self._inside -= 1

    def write(self, state: ReaderState) -> None:
        """Write what this reader needs, if that has changed."""
        if state == self._written:
            return
        with self.alone():
            atomic_write(self._mine.with_name(self._mine.name + ".json"), msgspec.json.encode(state))
            self._written = state

    def delete(self, candidates: Sequence[str], discard: Callable[[str], bool]) -> list[str]:
        """Call `discard` for those that no live reader of any run needs. Returns the names that were discarded."""
        with self.alone():
            return [name for name in deletable(candidates, self._needed()) if discard(name)]

    def close(self) -> None:
        """End this reader; it still counts as one that had registered."""
        self._lock.release()

    def _finished(self, epoch: int) -> Iterator[str]:
        """Readers that had finished this epoch before another one began: they count as registered."""
        for path in self._mine.parent.glob("*.json"):
            state, age_s = _read(path), time.time() - path.stat().st_mtime
            if state and state.epoch == epoch and not state.remaining and age_s < self._give_up_after_s:
                yield f"{path.stem}."

    def _needed(self) -> frozenset[str] | None:
        runs: dict[str, list[ReaderState]] = {}
        registered: dict[str, int] = {}
        for run in self._root.iterdir():
            if not run.is_dir():
                continue
            locks = list(run.glob("*.lock"))
            live = [path for path in locks if path.name == self._mine.name + ".lock" and run == self._mine.parent]
            live += [path for path in locks if path not in live and _is_held(path)]
            if not live:
                continue
            states = [_read(path.with_suffix(".json")) for path in live]
            if any(state is None for state in states):
                return None  # it has just registered, and not yet written what it needs
            runs[run.name] = [state for state in states if state is not None]
            began = (run / "began").stat().st_mtime if (run / "began").exists() else 0.0
            late = time.time() - began > self._give_up_after_s
            registered[run.name] = 1 << 30 if late else len(locks)
        return needed(runs, registered)


def _is_held(path: Path) -> bool:
    lock = FileLock(path)
    if not lock.try_acquire():
        return True
    lock.release()
    return False


def _read(path: Path) -> ReaderState | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=prepared(ReaderState))
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
