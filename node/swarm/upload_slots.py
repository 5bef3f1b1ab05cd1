"""How many peers a seed sends one file to at once: as few as fill its upload.

Measured, 128 MiB to eight nodes from a seed limited to 8 MB/s: with one slot it sends 1.04 to 1.11 times the file and
the last node is done in 1.03 to 1.11 times the time of one; with two slots 1.3 and 1.3, with four 1.5 and 1.5. But a
slow peer may keep the only slot and leave the seed nearly idle: then more are opened.

Pure: time is an argument, in seconds of any steady clock.
"""

from __future__ import annotations

MAX_SLOTS = 32
MIN_SLOTS = 2
"""libtorrent takes 1 when a torrent is added, and no less than 2 later."""
FILLED = 0.7
"""Of the limit; what a seed sends at its limit comes in bursts."""
UNLIMITED_BYTES_S = 50_000_000
"""What a seed without a limit is content with: about half of a gigabit network."""
PERIOD_S = 1.0


class UploadSlots:
    """The slots of one seeded file."""

    def __init__(self, limit_bytes_s: int, slots: int) -> None:
        self.slots = slots
        self._content_bytes_s = limit_bytes_s * FILLED if limit_bytes_s else UNLIMITED_BYTES_S
        self._last: tuple[float, int] | None = None
        self._idle_periods = 0

    def observe(self, now: float, uploaded_bytes: int, served: int) -> bool:
        """Whether `slots` changed. `uploaded_bytes` is the session's total, `served` how many slots are taken."""
        if self._last is None or now - self._last[0] > 4 * PERIOD_S:
            self._last = (now, uploaded_bytes)
            return False
        passed_s = now - self._last[0]
        if passed_s < PERIOD_S:
            return False
        rate = (uploaded_bytes - self._last[1]) / passed_s
        self._last = (now, uploaded_bytes)
        before = self.slots
        if rate >= self._content_bytes_s:
            self._idle_periods = 0
            self.slots = max(min(self.slots, MIN_SLOTS), self.slots - 1)
        elif served >= self.slots:
            # The first period is one of beginning, not of a slow peer.
            self._idle_periods += 1
            if self._idle_periods > 1:
                self.slots = min(MAX_SLOTS, self.slots + 1)
        else:
            self._idle_periods = 0
        return self.slots != before
