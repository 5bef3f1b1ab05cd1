"""What survives a crash: the position of a consumer, and the files it used, by key, size and validator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from node.files import atomic_write
from protocol.errors import InvalidParamsError
from protocol.structs import prepared
from torch_bridge.batches.folder import ConsumerFolder, read_json, write_json, writing
from torch_bridge.batches.plan import RemoteFile
from torch_bridge.batches.stats import ConsumerTimes

STATE_VERSION = 1
Done = dict[RemoteFile, int]
"""How often each file was used in an epoch."""


class ConsumerPosition(msgspec.Struct, frozen=True, kw_only=True):
    """The progress file of a consumer."""

    epoch: int
    """The unfinished one; those before it are finished."""
    subset: int = 0
    """The batch, counted from where this run began."""
    file: int = 0
    """Samples handed over of this batch, all passes together."""
    consumed: int = 0
    """Files of its part of the epoch that are used."""
    of: int = 0
    """Files in its part of the epoch."""
    seed: int = 0
    spent: ConsumerTimes = ConsumerTimes()


class ConsumerJournal:
    """Reads and writes the progress file and the journals of one consumer."""

    def __init__(self, folder: ConsumerFolder) -> None:
        self._folder = folder
        self._path = folder.home / "progress.json"

    def first_epoch(self) -> int:
        """The epoch that is not finished."""
        return first_epoch(self._folder.root, self._folder.home)

    def listing(self, epoch: int, ask: Any) -> list[RemoteFile]:
        """The files of an epoch: as the first of this machine's consumers found them, until the epoch is over."""
        path = self._epoch(epoch) / "listing.json"
        with self._folder.common_lock():
            known = read_json(path)
            if known is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                known = [[file.key, file.size, file.validator] for file in ask()]
                write_json(path, known)
        return [RemoteFile(*row) for row in known]

    def done(self, epoch: int) -> Done:
        """What any consumer of this machine has used. Lines that a crash cut are skipped."""
        found: Done = {}
        for path in sorted(self._epoch(epoch).glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    key, size, validator, count = json.loads(line)
                    file = RemoteFile(str(key), int(size), str(validator))
                except (ValueError, TypeError):
                    continue
                found[file] = max(found.get(file, 0), int(count))
        return found

    def begin(self, epoch: int, done: Mapping[RemoteFile, int]) -> None:
        """Start an epoch's journal of this consumer with the done files of its part; delete finished epochs."""
        path = self._journal(epoch)
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            atomic_write(path, b"".join(_line(file, count) for file, count in done.items()))
        with self._folder.common_lock():
            needed = min(lowest_epoch(self._folder.root), epoch)
            for old in (self._folder.root / "epochs").iterdir():
                if old.name.isdecimal() and int(old.name) < needed:
                    shutil.rmtree(old)

    def consumed(self, epoch: int, file: RemoteFile, count: int) -> None:
        """Record a use at once: the page cache outlives the process."""
        path = self._journal(epoch)
        with writing(path), path.open("ab", buffering=0) as out:
            out.write(_line(file, count))

    def at(self, position: ConsumerPosition) -> None:
        """Record the position of the consumer."""
        write_json(self._path, {**msgspec.structs.asdict(position), "spent": asdict(position.spent)}, "process")

    def _epoch(self, epoch: int) -> Path:
        return self._folder.root / "epochs" / f"{epoch:08d}"

    def _journal(self, epoch: int) -> Path:
        return self._epoch(epoch) / f"{self._folder.home.name}.jsonl"


def positions(root: Path) -> list[ConsumerPosition]:
    """Of all consumers of this machine that have one."""
    found = []
    for path in sorted(root.glob("c*/progress.json")):
        value = read_json(path)
        if isinstance(value, dict):
            found.append(msgspec.convert(value, prepared(ConsumerPosition)))
    return found


def lowest_epoch(root: Path) -> int:
    """The first epoch that some consumer of this machine has not finished."""
    layout = read_json(root / "layout.json") or {}
    known = positions(root)
    start = int(layout.get("first_epoch", 0))
    return min((one.epoch for one in known), default=start) if len(known) >= layout.get("consumers", 0) else start


def first_epoch(root: Path, home: Path) -> int:
    """The epoch that one consumer has not finished."""
    value = read_json(home / "progress.json")
    if isinstance(value, dict):
        return msgspec.convert(value, prepared(ConsumerPosition)).epoch
    return int((read_json(root / "layout.json") or {}).get("first_epoch", 0))


def state_of(epoch: int, seed: int, done: Mapping[RemoteFile, int]) -> dict[str, Any]:
    """Plain JSON."""
    rows = [[file.key, file.size, file.validator, count] for file, count in done.items()]
    return {"version": STATE_VERSION, "epoch": epoch, "seed": seed, "done": rows}


def read_state(state: Mapping[str, Any], seed: int) -> tuple[int, Done]:
    """The epoch, and what is done in it. Raises InvalidParamsError for a damaged state, or one of another seed."""
    try:
        if state["version"] != STATE_VERSION or state["seed"] != seed:
            raise InvalidParamsError(
                f"this state is of version {state['version']} and seed {state['seed']}; expected version "
                f"{STATE_VERSION} and seed {seed}: give the data set the seed that the run began with"
            )
        done = {RemoteFile(str(key), int(size), str(mark)): int(count) for key, size, mark, count in state["done"]}
        return int(state["epoch"]), done
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidParamsError(f"not a state of a StreamingBatchDataset: {error!r}") from None


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of those of all consumers, which each of another number of consumers can load.

    They continue in the earliest epoch of them; what is done in a later one is done again.
    """
    if not states:
        raise InvalidParamsError("no states to merge: give those of all workers of all ranks")
    read = [(state, *read_state(state, state["seed"])) for state in states]
    epoch, seed = min(one[1] for one in read), states[0]["seed"]
    merged: Done = {}
    for _, at, done in read:
        for file, count in _of(done, at, epoch):
            merged[file] = max(merged.get(file, 0), count)
    return state_of(epoch, seed, merged)


def _of(done: Done, at: int, epoch: int) -> Iterable[tuple[RemoteFile, int]]:
    return done.items() if at == epoch else ()


def _line(file: RemoteFile, count: int) -> bytes:
    return msgspec.json.encode([file.key, file.size, file.validator, count]) + b"\n"
