"""The root CID of bytes, as Akave's SDK computes it."""

from __future__ import annotations

from collections.abc import Iterable

from node.origin.akave.cid import RootCid


def root_cid_of(parts: Iterable[bytes | bytearray | memoryview]) -> str:
    """The root CID of the concatenation of the parts."""
    root = RootCid()
    for part in parts:
        root.update(part)
    return root.text()
