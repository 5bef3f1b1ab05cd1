"""TextLoader: documents of a text column as token batches without padding, and a state after each that continues it.

Each document is tokenised and follows a BOS token; all of them form one run of tokens, which batches cut. A state names
the documents of the oldest unread token, and how many of their tokens are read: it stays small whatever is in the
buffer, and a continued loader tokenises those documents again. Any number of ranks can continue from the states of all
ranks together (`elastic_resume`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from protocol.errors import InvalidParamsError
from torch_bridge.streaming.dataset import StreamingShardDataset
from torch_bridge.streaming.elastic_resume import PartialBatch, Remainder, following, left_by

Tokens = NDArray[np.int64]
Tokenise = Callable[[list[str]], Iterable[Sequence[int] | NDArray[Any]]]
"""The tokens of each text, without BOS."""
TextBatch = tuple[torch.Tensor, torch.Tensor, dict[str, Any]]
VERSION = 1
_CHECKED = 16
"""Tokens of a state that a continued loader must find again."""


@dataclass
class _Documents:
    """Tokens of documents of one batch of the data set."""

    before: dict[str, Any]
    """The data set's state before they were taken."""
    tokens: Tokens
    used: int = 0


class TextLoader:
    """Iterates `(inputs, targets, state)`: int64 tensors (batch_rows, row_tokens); `targets` is one token ahead.

    `dataset`: its batches are tokenised together; it gives the order, the rank and the epoch. `column` holds text;
    nulls are skipped. `epochs`: read epochs below it; None: without end. Tokens of the last epoch that fill no batch
    are dropped. One iteration at a time.
    """

    def __init__(
        self,
        dataset: StreamingShardDataset,
        tokenise: Tokenise,
        *,
        bos: int,
        batch_rows: int,
        row_tokens: int,
        column: str = "text",
        epochs: int | None = None,
    ) -> None:
        for name, value in (("batch_rows", batch_rows), ("row_tokens", row_tokens)):
            if value < 1:
                raise InvalidParamsError(f"{name} must be at least 1, not {value}")
        self._dataset, self._tokenise, self._bos, self._column = dataset, tokenise, bos, column
        self._rows, self._row_tokens, self._epochs = batch_rows, row_tokens, epochs
        self._left = Remainder()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration continues after the batch that `state` came with; this rank among as many ranks saved it.

        Raises InvalidParamsError if it cannot continue exactly, and says why.
        """
        here = [self._dataset.ranks.rank, self._dataset.ranks.world_size]
        if [state["rank"], state["dataset"]["ranks"]] != here:
            raise InvalidParamsError(
                f"the state is rank {state['rank']}'s of {state['dataset']['ranks']}, this is rank {here[0]} of "
                f"{here[1]}: ranks are at different documents, so another number continues from the states of all "
                "(load_state_dicts)"
            )
        _check_version(state)
        self._dataset.load_state_dict(state["dataset"])
        earlier = Remainder.of(state.get("left"))
        begun = _begun(state, here[0])
        others = tuple(one for one in earlier.begun if (one.epoch, one.number) != (begun.epoch, begun.number))
        self._left = Remainder(earlier.passed, (begun, *others))

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the states of all ranks, in their order, of one step: each document continues where it was, on
        some rank. The same number of ranks yields the batches that would have come.

        Raises InvalidParamsError as `load_state_dict` does.
        """
        if len(states) == self._dataset.ranks.world_size:
            return self.load_state_dict(states[self._dataset.ranks.rank])
        for rank, state in enumerate(states):
            _check_version(state)
            if [state["rank"], state["dataset"]["ranks"]] != [rank, len(states)]:
                raise InvalidParamsError(
                    f"state {rank} of {len(states)} is rank {state['rank']}'s of {state['dataset']['ranks']}: give "
                    "those of all ranks, in their order"
                )
        found = left_by(states, lambda epoch: self._dataset.order(epoch).batches)
        epoch, base = found.first()
        place = {"epoch": epoch, "base": base, "own": 0, "ranks": self._dataset.ranks.world_size}
        self._dataset.load_state_dict({**states[0]["dataset"], **place})
        self._left = found

    def __iter__(self) -> Iterator[TextBatch]:
        size = self._rows * self._row_tokens
        buffer: deque[_Documents] = deque()
        held = 0
        left, self._left = self._left, Remainder()  # a state is continued once
        for documents in self._documents(left):
            buffer.append(documents)
            held += documents.tokens.size - documents.used
            while held > size:
                run = torch.from_numpy(_peek(buffer, size + 1))
                _advance(buffer, size)
                held -= size
                shape = (self._rows, self._row_tokens)
                yield run[:-1].reshape(shape), run[1:].reshape(shape).clone(), self._state(buffer, left)

    def _documents(self, left: Remainder) -> Iterator[_Documents]:
        """What is tokenised together, over all epochs, without what was read before the state."""
        epochs_without = 0
        while self._epochs is None or self._dataset.epoch < self._epochs:
            epochs_without += 1
            self._dataset.set_epoch(self._dataset.epoch)  # not the next one, if this one was read
            with closing(iter(self._dataset)) as batches:  # type: ignore[type-var]
                before = self._dataset.state_dict()
                for batch in batches:
                    epoch, number = before["epoch"], following(before, self._dataset.ranks.rank)
                    if not left.has(epoch, number):
                        documents = _Documents(before, self._tokens(batch))
                        if begun := left.begun_at(epoch, number):
                            documents = _behind(documents, begun)
                        if documents.tokens.size > documents.used:
                            epochs_without = 0
                            yield documents
                    before = self._dataset.state_dict()
            if epochs_without == 2:  # the first may have been continued at its end
                ranks = self._dataset.ranks
                raise InvalidParamsError(
                    f"no text for rank {ranks.rank} of {ranks.world_size} in a whole epoch: it takes fewer "
                    "ranks, smaller batches of documents, or more shards"
                )
            self._dataset.set_epoch(self._dataset.epoch + 1)

    def _tokens(self, batch: Mapping[str, Any]) -> Tokens:
        if self._column not in batch:
            raise InvalidParamsError(
                f"the data set has no column {self._column!r}; it has {', '.join(batch)}: name the one that holds text "
                "by column="
            )
        texts = [text for text in batch[self._column] if text is not None]
        parts: list[Tokens] = []
        for tokens in self._tokenise(texts):
            parts += [np.array([self._bos], np.int64), np.asarray(tokens, dtype=np.int64)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _state(self, buffer: deque[_Documents], left: Remainder) -> dict[str, Any]:
        oldest, rank = buffer[0], self._dataset.ranks.rank
        unread = oldest.tokens[oldest.used : oldest.used + _CHECKED]
        before = left.behind(oldest.before["epoch"], following(oldest.before, rank))
        return {
            "version": VERSION,
            "rank": rank,
            "dataset": oldest.before,
            "used_tokens": oldest.used,
            "next_tokens": unread.tolist(),
            "left": before.state(),
        }


def _check_version(state: Mapping[str, Any]) -> None:
    if state.get("version") != VERSION:
        raise InvalidParamsError(f"the state has version {state.get('version')}, this release reads {VERSION}")


def _begun(state: Mapping[str, Any], rank: int) -> PartialBatch:
    at = state["dataset"]
    return PartialBatch(at["epoch"], following(at, rank), int(state["used_tokens"]), tuple(state["next_tokens"]))


def _behind(documents: _Documents, begun: PartialBatch) -> _Documents:
    end = begun.used_tokens + len(begun.next_tokens)
    if documents.tokens[begun.used_tokens : end].tolist() != list(begun.next_tokens):
        raise InvalidParamsError(
            "the texts where the state continues give other tokens than when it was saved: use the same tokeniser"
        )
    return _Documents(documents.before, documents.tokens, begun.used_tokens)


def _peek(buffer: deque[_Documents], count: int) -> Tokens:
    """The next tokens, which stay there."""
    parts, missing = [], count
    for documents in buffer:
        part = documents.tokens[documents.used : documents.used + missing]
        parts.append(part)
        missing -= part.size
        if not missing:
            break
    return np.concatenate(parts)


def _advance(buffer: deque[_Documents], count: int) -> None:
    """`count` tokens are read; fewer than there are."""
    while count >= (left := buffer[0].tokens.size - buffer[0].used):
        buffer.popleft()
        count -= left
    buffer[0].used += count
