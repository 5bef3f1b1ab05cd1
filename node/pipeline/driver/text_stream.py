"""Bytes of tokens to text that can be shown: whole characters only, and nothing that a stop string may still swallow.

Sans I/O. A character may span tokens, and so may a stop string. What comes out does not depend on where the
borders of the tokens lie.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from protocol.errors import InvalidParamsError


class TextStream:
    """Feed the bytes of each token, show what comes back, call `finish` at the end.

    Where several stop strings match, the one that is complete first wins; of those that are complete at the same
    character, the longest. Neither it nor anything after it is ever shown. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise InvalidParamsError("a stop string is empty; leave it out")
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        """Whether a stop string was found; what is fed afterwards is ignored."""

    def feed(self, piece: bytes) -> str:
        """Take one token's bytes; return the text that is safe to show now."""
        return "" if self.stopped else self._take(self._decoder.decode(piece))

    def finish(self) -> str:
        """Return what was held back: an unfinished character as U+FFFD, and the start of a stop string."""
        if self.stopped:
            return ""
        shown = self._take(self._decoder.decode(b"", True))
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _take(self, new: str) -> str:
        if not self._stop:
            return new
        searched = len(self._held)
        text = self._held + new
        found = self._first_stop(text, searched)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_stop(self, text: str, searched: int) -> int | None:
        """Where the stop string starts that is complete first, if any is; none ends before `searched`."""
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
