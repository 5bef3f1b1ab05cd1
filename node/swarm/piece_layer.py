"""The piece layer of a download: with it a piece can be checked alone, and a part file after a crash.

Peers give it, or the caller hands it over (from a torrent file at an origin).
"""

from __future__ import annotations

import hashlib

from node.swarm.handle import Handle
from node.swarm.part_file import PartFile
from node.swarm.torrent import Torrent
from protocol.content import LEAF_BYTES, merkle_root
from protocol.errors import InvalidShardError


class PieceLayer:
    """The piece layer of one download, as far as it is known. Time is in seconds of any steady clock."""

    def __init__(self, torrent: Torrent, part: PartFile, known: bytes, ask_every_s: float) -> None:
        self.known = known
        """32 bytes a piece; empty while it is not known, and for a file of one piece, which has none."""
        self.is_new_to_session = False
        """Whether it was handed over after the torrent was added without it."""
        self._torrent = torrent
        self._part = part
        self._ask_every_s = ask_every_s
        self._due = 0.0

    @property
    def missing(self) -> bool:
        return not self.known and self._torrent.pieces > 1

    @property
    def asked(self) -> bool:
        """Whether the session was asked for it once."""
        return self._due > 0

    def take(self, layer: bytes) -> bool:
        """Take one from another source than peers. True if it was not known.

        Raises InvalidShardError if it does not fit the content id.
        """
        if not self._torrent.has_layer(layer):
            raise InvalidShardError(
                f"the piece layer of {self._torrent.name!r} does not belong to content id {self._torrent.content_id}"
            )
        if not self.missing:
            return False
        self.known = layer
        self.is_new_to_session = True
        return True

    async def keep(self) -> None:
        """Write it beside the part file: with it the part file can be checked after a crash."""
        if self.known:
            await self._part.keep_layer(self.known)

    async def learn(self, handle: Handle, now: float) -> None:
        """Ask the session, now and then, whether peers have given all of it."""
        if not self.missing or now < self._due:
            return
        self._due = now + self._ask_every_s
        layer = (await handle.save(flush=False)).piece_layer
        if self.missing and self._torrent.has_layer(layer):
            self.known = layer
            await self.keep()


def piece_fits(torrent: Torrent, layer: bytes, index: int, data: bytes) -> bool:
    """Whether these are the bytes of a piece, by the piece layer, or by the content id of a file of one piece (BEP 52).

    Computes for milliseconds: call it off the event loop.
    """
    leaves = [hashlib.sha256(data[start : start + LEAF_BYTES]).digest() for start in range(0, len(data), LEAF_BYTES)]
    if torrent.pieces == 1:
        return merkle_root(leaves).hex() == torrent.content_id
    leaves += [bytes(32)] * (torrent.piece_length // LEAF_BYTES - len(leaves))
    return merkle_root(leaves) == layer[32 * index : 32 * index + 32]
