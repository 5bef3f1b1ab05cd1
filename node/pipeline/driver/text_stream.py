"""The bytes of tokens to text that can be shown: whole characters, and nothing that may be part of a stop string.

No I/O. A character may span several tokens, and so may a stop string. The text does not depend on how it is divided
into tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from protocol.errors import InvalidParamsError


class TextStream:
    """Feed the bytes of each token, show what `feed` returns, call `finish` at the end.

    If several stop strings match, the one that is complete first ends the text; of those that are complete at the same
    character, the longest. Neither it nor anything after it is shown. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise InvalidParamsError(f"stop is {list(stop)!r}, but a stop string must not be empty; leave that one out")
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = ""
        self.stopped = False
        """Whether a stop string was found; everything fed after it is ignored."""

    def feed(self, piece: bytes) -> str:
        """Take one token's bytes; return the text that is safe to show now."""
        return "" if self.stopped else self._take(self._decoder.decode(piece))

    def finish(self) -> str:
        """Return the text that was held back: an unfinished character as U+FFFD, and the start of a stop string."""
        if self.stopped:
            return ""
        shown = self._take(self._decoder.decode(b"", True))
        if not self.stopped:
            shown, self._pending = shown + self._pending, ""
        return shown

    def _take(self, new: str) -> str:
        if not self._stop:
            return new
        searched = len(self._pending)
        text = self._pending + new
        found = self._first_stop(text, searched)
        if found is not None:
            self.stopped, self._pending = True, ""
            return text[:found]
        keep = self._possible_start(text)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_stop(self, text: str, searched: int) -> int | None:
        """Start of the stop string that is complete first, None if there is none; none ends before `searched`."""
        best: tuple[int, int] | None = None
        for stop in self._stop:
            at = text.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0 and (best is None or (at + len(stop), at) < best):
                best = (at + len(stop), at)
        return None if best is None else best[1]

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
