"""The machine's ledger of readers: which process still needs which shard, so that no needed shard is deleted.

Each reader (a rank's worker) of a run has a file with the shards that it needs, and a lock that ends with its process.
The lock of the whole ledger is held by a process that decides, deletes, or needs more shards.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

from node.files import FileLock, atomic_write, is_held_here
from protocol.errors import ShardInUseError
from protocol.structs import prepared
from torch_bridge.core.closing import wait_for_others
from torch_bridge.shards.disk_space import allocated_bytes

REGISTERING_S = 600.0
"""For so long readers wait for others of their run to register."""
LEAVING_S = 30.0
"""A reader of the same name in another process may take so long to end: a DataLoader starts new workers before the old
ones are gone.
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
    kept: tuple[str, ...] = ()
    """Under a limit of the disk: shards that it is past, and has not seen deleted."""
    waits: str = ""
    """Under a limit: the shard that its caller waits for, and that there is no room for."""
    together_bytes: int = 0
    """Under a limit: what readers of its run must have on the disk at once."""
    own_bytes: int = 0
    """Under a limit: the most that it has open at once itself."""


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


@dataclass(frozen=True)
class LedgerView:
    """What all readers of a folder have written, as one of them reads it."""

    run: str
    reader: str
    runs: Mapping[str, Mapping[str, ReaderState | None]]
    """Of the readers that live, by run and name. None: it has just registered, and not yet written."""
    registered: Mapping[str, int]
    """Readers that count as registered, of each run."""
    ended: tuple[ReaderState, ...] = ()
    """Of readers of this run that are gone."""

    def needed(self) -> frozenset[str] | None:
        """The shards that may not be deleted; None if nothing may be."""
        runs: dict[str, list[ReaderState]] = {}
        for run, readers in self.runs.items():
            runs[run] = [state for state in readers.values() if state is not None]
            if len(runs[run]) < len(readers):
                return None
        return needed(runs, self.registered)

    def others(self, *, everywhere: bool = True) -> dict[str, ReaderState]:
        """The other readers that live, of all runs or of this one, by a name that tells them apart."""
        return {
            reader if run == self.run else f"{reader} of run {run!r}": state
            for run, readers in self.runs.items()
            for reader, state in readers.items()
            if state is not None and (everywhere or run == self.run) and (run, reader) != (self.run, self.reader)
        }

    def begun(self, mine: ReaderState) -> int:
        """Readers of this run that have begun the epoch of `mine`, this one among them."""
        states = [*self.others(everywhere=False).values()]
        states += [state for state in self.ended if state.epoch > mine.epoch or not state.remaining]
        return 1 + sum(state.epoch >= mine.epoch for state in states)


class ReaderLedger:
    """One reader's part in the ledger of a folder."""

    def __init__(
        self,
        folder: Path,
        run: str,
        reader: str,
        state: ReaderState | None = None,
        *,
        give_up_after_s: float = REGISTERING_S,
    ) -> None:
        """Register a reader and its state. `give_up_after_s`: for so long the others wait for readers to register.

        Raises ShardInUseError if a living process is this reader already; its details say `here` if that is this
        process. OSError of the disk.
        """
        self._root = folder / ".readers"
        self._mine = self._root / quote(run, safe="") / quote(reader, safe="")
        self._lock = FileLock(self._mine.with_name(self._mine.name + ".lock"))
        self._run, self._reader = run, reader
        self._give_up_after_s = give_up_after_s
        self._known: dict[Path, tuple[tuple[int, int, int], ReaderState | None]] = {}
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
                here = is_held_here(self._lock.path)
                raise ShardInUseError(
                    f"{'this' if here else 'another'} process reads as {reader!r} of run {run!r} in {folder} already: "
                    "give each its own reader= (rank and worker), and each run its own (run=)",
                    {"here": here},
                )
            if state is not None:
                try:
                    self.write(state)
                except OSError:
                    self._lock.release()
                    raise

    @classmethod
    def join(cls, folder: Path, run: str, reader: str, state: ReaderState) -> ReaderLedger:
        """The same. One of this name in this process ends first if it is garbage, or closing."""
        try:
            return cls(folder, run, reader, state)
        except ShardInUseError as error:
            if error.details["here"]:
                gc.collect()
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
            return [name for name in deletable(candidates, self.view().needed()) if discard(name)]

    def close(self) -> None:
        """End this reader; it still counts as one that had registered."""
        self._lock.release()

    def _finished(self, epoch: int) -> Iterator[str]:
        """Readers that had finished this epoch before another one began: they count as registered."""
        for path in self._mine.parent.glob("*.json"):
            state, age_s = _read(path), time.time() - path.stat().st_mtime
            if state and state.epoch == epoch and not state.remaining and age_s < self._give_up_after_s:
                yield f"{path.stem}."

    def view(self) -> LedgerView:
        """What is written now."""
        runs: dict[str, dict[str, ReaderState | None]] = {}
        registered: dict[str, int] = {}
        ended: list[ReaderState] = []
        for run in self._root.iterdir():
            if not run.is_dir():
                continue
            mine = run == self._mine.parent
            locks = list(run.glob("*.lock"))
            live = [path for path in locks if mine and path.name == self._mine.name + ".lock"]
            live += [path for path in locks if path not in live and _is_held(path)]
            if mine:
                gone = [self._read(path.with_suffix(".json")) for path in locks if path not in live]
                ended = [state for state in gone if state is not None]
            if not live:
                continue
            runs[unquote(run.name)] = {unquote(path.stem): self._read(path.with_suffix(".json")) for path in live}
            began = (run / "began").stat().st_mtime if (run / "began").exists() else 0.0
            late = time.time() - began > self._give_up_after_s
            registered[unquote(run.name)] = 1 << 30 if late else len(locks)
        return LedgerView(self._run, self._reader, runs, registered, tuple(ended))

    def mark(self) -> object:
        """Another value once a reader has written, or a file of the folder has come or gone. One of two changes within
        a tick of the file system's clock may be missed.
        """
        return [path.stat().st_mtime_ns for path in (self._root.parent, self._root, self._mine.parent)]

    def size_bytes(self) -> int:
        """Blocks on the disk of what all readers have written."""
        return sum(allocated_bytes(path) for path in self._root.glob("*/*.json"))

    def _read(self, path: Path) -> ReaderState | None:
        """As `_read`, and each version of a file once."""
        try:
            seen = path.stat()
        except FileNotFoundError:
            return None
        version = seen.st_mtime_ns, seen.st_size, seen.st_ino
        if path not in self._known or self._known[path][0] != version:
            self._known[path] = version, _read(path)
        return self._known[path][1]


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
