"""When a shard that did not come is tried again, and when it is given up."""

from __future__ import annotations

import time

from protocol.errors import ShoalError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0


class Failure:
    """The last failure of a shard, and when it is tried again."""

    def __init__(self, error: ShoalError, before: Failure | None, total_s: float) -> None:
        now = time.monotonic()
        self.error = error
        self.began_at: float = before.began_at if before else now
        self.pause_s: float = min(before.pause_s * 2, _LONGEST_PAUSE_S) if before else _FIRST_PAUSE_S
        self.again_at = now + self.pause_s
        self.for_good = not error.retryable or now - self.began_at > total_s
