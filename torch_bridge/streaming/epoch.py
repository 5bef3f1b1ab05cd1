"""The epoch of a data set and how far its readers are in it, in memory that a DataLoader's workers share."""

from __future__ import annotations

import time

import torch

MOST_WORKERS = 1024
_LOADED_WAIT_S = 60.0
_LOOK_S = 0.01
_EPOCH, _READERS, _CHOSEN, _BASE, _NOTHING_LEFT, _TOLD, _HEAD = range(7)
_GIVEN, _LOADED, _TAKEN = range(3)
_UNFINISHED, _FINISHED = 1, 2


class SharedEpoch:
    """Each cell has one writer at a time, and the order of writes makes locks unnecessary.

    An epoch is over when all readers of an iteration have given its last batch; the next iteration then takes the next
    one, unless `choose` was called meanwhile. An iteration that was left in the middle begins its epoch again.
    """

    def __init__(self) -> None:
        cells = torch.zeros(_HEAD + 3 * MOST_WORKERS, dtype=torch.int64)
        self._cells: torch.Tensor = cells.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def number(self) -> int:
        return int(self._cells[_EPOCH])

    @property
    def base(self) -> int:
        """The batch of the epoch at which the last iteration began."""
        return int(self._cells[_BASE])

    @property
    def chosen(self) -> int | None:
        """What `choose` was called with since an epoch was last finished."""
        return int(self._cells[_CHOSEN]) - 1 if self._cells[_CHOSEN] else None

    @property
    def nothing_left(self) -> bool:
        """Whether the chosen epoch is one that had been read when a state was saved."""
        return bool(self._cells[_NOTHING_LEFT])

    def choose(self, epoch: int) -> None:
        self.continue_at(epoch)
        self._cells[_CHOSEN] = epoch + 1

    def continue_at(self, epoch: int) -> None:
        """The epoch of a loaded state."""
        self._cells[_READERS] = 0
        self._cells[_BASE] = 0
        self._cells[_NOTHING_LEFT] = 0
        self._cells[_EPOCH] = epoch

    def begin(self, worker: int, workers: int, epoch: int | None = None, base: int = 0) -> int:
        """The epoch of an iteration that begins; `epoch` if that is given."""
        readers = int(self._cells[_READERS])
        given = set(self._of(_GIVEN, readers))
        now = self.number  # last: a reader that began before this one has written it first
        if epoch is None:
            epoch = now + 1 if given == {now + 1} and not self.nothing_left else now
        self._cells[_EPOCH] = epoch
        self._cells[_BASE] = base
        self._cells[_READERS] = workers
        self._set(_GIVEN, worker, 0)
        return epoch

    def finish(self, worker: int, epoch: int) -> None:
        """This reader gives the last batch of its epoch."""
        self._set(_GIVEN, worker, epoch + 1)
        self._set(_LOADED, worker, 0)
        if not self.nothing_left:
            self._cells[_CHOSEN] = 0

    def leave_nothing(self) -> None:
        """The chosen epoch had been read; iterations are empty until another one is chosen."""
        self._cells[_NOTHING_LEFT] = 1

    def tell_once(self) -> bool:
        """Whether nobody asked this before."""
        is_first = not self._cells[_TOLD]
        self._cells[_TOLD] = 1
        return bool(is_first)

    def load(self, worker: int, *, finished: bool) -> int:
        """This reader has a state, which has batches of its epoch left for it or not. Returns a number for `take`."""
        self._set(_LOADED, worker, _FINISHED if finished else _UNFINISHED)
        return 1 + max(self._of(_TAKEN, MOST_WORKERS))

    def take(self, loaded: int, worker: int) -> bool:
        """Whether this reader's iteration is the one that continues from a loaded state: each state is taken once."""
        readers = int(self._cells[_READERS])
        if not loaded or self._of(_TAKEN, worker + 1)[worker] >= loaded or (worker >= readers > 0):
            return False
        self._set(_TAKEN, worker, loaded)
        return True

    def is_taken(self, loaded: int) -> bool:
        """Whether an iteration has begun that continues from it."""
        return max(self._of(_TAKEN, MOST_WORKERS)) >= loaded

    def all_finished(self, workers: int) -> bool:
        """Whether the states of all readers were finished. Waits until each of them has loaded its own."""
        until = time.monotonic() + _LOADED_WAIT_S
        while 0 in (found := self._of(_LOADED, workers)):
            if time.monotonic() > until:
                return False
            time.sleep(_LOOK_S)
        return set(found) == {_FINISHED}

    def _of(self, what: int, count: int) -> list[int]:
        start = _HEAD + what * MOST_WORKERS
        found: list[int] = self._cells[start : start + count].tolist()
        return found

    def _set(self, what: int, worker: int, value: int) -> None:
        self._cells[_HEAD + what * MOST_WORKERS + worker] = value
