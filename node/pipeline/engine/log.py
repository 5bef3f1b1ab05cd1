"""The log of llama.cpp, into Python's logging: by whole lines, bounded in length and in number.

llama.cpp's default is stderr. Its INFO lines describe a file's contents and become DEBUG here; the latest warnings and
errors are kept, so that an error can say why the library refused a call.
"""

from __future__ import annotations

import logging
import time
from collections import deque

MAX_LINE_CHARS = 500
MAX_LINES_PER_MINUTE = 600

_log = logging.getLogger("shoal.llama")
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}
"""ggml_log_level DEBUG, INFO, WARN, ERROR."""
_CONTINUED = 5
_WARN = 3


class LineLog:
    """Joins fragments to lines, and bounds their number."""

    def __init__(self) -> None:
        self._fragment = ""
        self._level = 2
        self._problems: deque[str] = deque(maxlen=4)
        self._minute = 0.0
        self._lines = 0

    def feed(self, level: int, text: str, now: float) -> None:
        """Take a fragment of ggml's level; a line is logged once it is complete."""
        if level != _CONTINUED:
            self._level = level
        *lines, rest = (self._fragment + text).split("\n")
        self._fragment = rest[:MAX_LINE_CHARS]
        for line in lines:
            if line.strip(" ."):  # rows of dots are a progress bar
                self._emit(line.rstrip()[:MAX_LINE_CHARS], now)

    def take_problems(self) -> str:
        """Return the latest warnings and errors, joined, and forget them."""
        text = "; ".join(self._problems)
        self._problems.clear()
        return text

    def _emit(self, line: str, now: float) -> None:
        if self._level >= _WARN:
            self._problems.append(line)
        level = _LEVELS.get(self._level, logging.DEBUG)
        if not _log.isEnabledFor(level):
            return
        if now - self._minute >= 60:
            self._minute, self._lines = now, 0
        self._lines += 1
        if self._lines == MAX_LINES_PER_MINUTE:
            _log.warning("llama.cpp logged %d lines within a minute: the rest of that minute is dropped", self._lines)
        elif self._lines < MAX_LINES_PER_MINUTE:
            _log.log(level, "%s", line)


_lines = LineLog()


def on_log(level: int, text: bytes, _user_data: int | None) -> None:
    """`ggml_log_callback`; called from any thread of the library."""
    _lines.feed(level, text.decode(errors="replace"), time.monotonic())


def on_abort(message: bytes) -> None:
    """`ggml_abort_callback_t`: called before the library ends the process, which nothing can prevent."""
    _log.critical("llama.cpp ends this process: %s", message.decode(errors="replace")[:MAX_LINE_CHARS])


def take_problems() -> str:
    """The library's warnings and errors since the last call, at most four lines."""
    return _lines.take_problems()
