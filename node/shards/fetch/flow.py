"""When bytes of a shard last came, and whether past the lease. Pure: time is an argument, in seconds."""

from __future__ import annotations


class Flow:
    """What came of one shard so far, over every download that its fetch begins."""

    def __init__(self, now: float) -> None:
        self.most = 0
        """Bytes that were here at a time."""
        self.moved_at = now
        """When anything came, from wherever."""
        self.shared_at = now
        """When anything came that does not go past the lease: this node's own blocks, and what peers gave."""
        self.given_bytes = 0
        """Of pieces from origins that were not here yet, those that are being given among them."""
        self.peer_bytes = 0
        """That peers gave, or an earlier try: the most that it was, since a piece is given before it is here."""

    def begin(self, now: float) -> None:
        """A download begins: it is given time."""
        self.moved_at = self.shared_at = now

    def came(self, now: float, *, shared: bool) -> None:
        """A chunk came from an origin; `shared`: of a block that the lease gives to this node."""
        self.moved_at = now
        if shared:
            self.shared_at = now

    def saw(self, now: float, bytes_done: int) -> None:
        """So many checked bytes are here."""
        if bytes_done > self.most:
            self.most, self.moved_at = bytes_done, now
        if bytes_done - self.given_bytes > self.peer_bytes:
            self.peer_bytes, self.shared_at = bytes_done - self.given_bytes, now
