"""Whether peers give enough of a download, or the origin is to help. Pure: time is an argument, in seconds."""

from __future__ import annotations

from collections import deque


class Need:
    """What peers gave lately."""

    def __init__(self, now: float, *, gone_after_s: float, slow_bytes_s: float, slow_after_s: float) -> None:
        self._gone_after_s = gone_after_s
        self._slow_bytes_s = slow_bytes_s
        self._slow_after_s = slow_after_s
        self._connected_at = now
        self._samples: deque[tuple[float, int]] = deque()

    def saw(self, now: float, peer_bytes: int, peers: int) -> None:
        """So many bytes came from peers so far, and so many peers are connected."""
        if peers:
            self._connected_at = now
        if not self._samples or now - self._samples[-1][0] >= self._slow_after_s / 20:
            self._samples.append((now, peer_bytes))
        while len(self._samples) > 1 and now - self._samples[1][0] >= self._slow_after_s:
            self._samples.popleft()

    def gone(self, now: float) -> bool:
        """Whether no peer was connected for `gone_after_s`."""
        return now - self._connected_at >= self._gone_after_s

    def slow(self, now: float) -> bool:
        """Whether peers gave less than `slow_bytes_s` over the last `slow_after_s`; they are given so long."""
        if not self._samples or now - self._samples[0][0] < self._slow_after_s:
            return False
        (began, before), (_, after) = self._samples[0], self._samples[-1]
        return after - before < self._slow_bytes_s * (now - began)
