"""When a download is restarted, and which of its peers it then connects: decided here, done in `download`.

libtorrent bans a peer whose bytes made a piece fail. If a good and a bad peer both gave to that piece, the good one is
sometimes banned too, and the download stalls. The cure, measured: take the torrent out, put it back, and connect its
peers one at a time, so that the peer that is connected when a piece fails is the one to blame.

Pure: time is an argument, in seconds of any steady clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import Enum

from node.swarm.torrent import PeerAddress

IDLE_S = 20.0
MAX_PATIENCE_S = 60.0


class Verdict(Enum):
    """What to do now."""

    GO_ON = "go on"
    RESTART = "restart"
    """Take the torrent out and put it back, then connect `next_peer()`."""
    CONNECT_NEXT = "connect next"
    """Connect `next_peer()` beside those that are connected."""


class Watchdog:
    """Watches one download."""

    def __init__(self, stall_s: float, now: float) -> None:
        self.careful = False
        """Whether peers are connected one at a time, and peer exchange is off."""
        self._stall_s = stall_s
        self._blame: Counter[PeerAddress] = Counter()
        self._trial: list[PeerAddress] = []
        self._trouble = False
        self._best = 0
        self._moved = now
        self._restarts = 0

    def progressed(self, now: float, bytes_done: int) -> None:
        """The download has `bytes_done`; fewer than before, after a piece failed, is not progress."""
        if bytes_done > self._best:
            self._best = bytes_done
            self._moved = now

    def piece_failed(self) -> None:
        """A piece did not pass its check, or a peer was banned for it."""
        if not self._trouble and self._trial:
            # The latest to be connected is the only one that had not proved itself.
            self._blame[self._trial[-1]] += 1
        self._trouble = True

    def verdict(self, now: float, known: Iterable[PeerAddress]) -> Verdict:
        """What to do, given the peers that are known."""
        peers = set(known)
        if not peers:
            return Verdict.GO_ON
        # Every peer gets its turns; from then on turns become rare, since there may be none but bad ones.
        patience_s = min(MAX_PATIENCE_S, self._stall_s * 2 ** max(0, min(8, self._restarts - 2 * len(peers))))
        if not self.careful and not self._trouble:
            patience_s = max(patience_s, IDLE_S)
        elif self.careful and self._trouble and not all(self._blame[peer] for peer in peers):
            patience_s = min(patience_s, 1.0)  # the peers to blame are known, and others are left
        if now - self._moved < patience_s:
            return Verdict.GO_ON
        if self.careful and not self._trouble and peers - set(self._trial):
            return Verdict.CONNECT_NEXT
        return Verdict.RESTART

    def restarted(self, now: float) -> None:
        """The torrent was taken out and put back; no peer is connected."""
        self.careful = self.careful or self._trouble
        self._trouble = False
        self._trial = []
        self._best = 0
        self._moved = now
        self._restarts += 1

    @property
    def alone(self) -> bool:
        """Whether no more than one peer was connected since the last restart."""
        return len(self._trial) <= 1

    def next_peer(self, now: float, known: Iterable[PeerAddress]) -> PeerAddress | None:
        """The least blamed peer that has not been connected since the last restart; it counts as connected now."""
        untried = [peer for peer in known if peer not in self._trial]
        if not untried:
            return None
        peer = min(untried, key=lambda candidate: self._blame[candidate])
        self._trial.append(peer)
        self._moved = now
        return peer
