"""A download on disk: the part file, the space kept for it, and what continues it after a stop or a crash.

Two small files stand beside it in the state folder. `<info hash>.layer` is the piece layer as peers gave it: with
it a part file that a crash left can be checked. `<info hash>.resume` is written at a clean stop and deleted when
the download goes on, so that after a crash there is none and the part file is checked instead.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from node.files import atomic_write, part_path
from node.swarm.handle import file_error
from node.swarm.torrent import Torrent
from protocol.structs import prepared


class _Resume(msgspec.Struct):
    data: bytes
    mtime_ns: int
    """Of the part file when it was written: a file that changed since is checked."""


class PartFile:
    """The file that a download writes, and its two companions. Every method does its file work off the loop."""

    def __init__(self, torrent: Torrent, final_path: Path, state_dir: Path) -> None:
        self.path = part_path(final_path)
        self._torrent = torrent
        self._layer = state_dir / f"{torrent.info_hash}.layer"
        self._resume = state_dir / f"{torrent.info_hash}.resume"

    async def reserve(self) -> bool:
        """Allocate the space that the file needs. True if the part file is new.

        Raises InsufficientDiskError if there is no space; a new part file is then deleted again.
        """
        return await asyncio.to_thread(self._reserve_now)

    def _reserve_now(self) -> bool:
        created = not self.path.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.posix_fallocate(descriptor, 0, self._torrent.size)
            finally:
                os.close(descriptor)
        except OSError as err:
            if created:
                self.path.unlink(missing_ok=True)
            raise file_error(self.path, err.errno or 0, str(err)) from None
        return created

    async def load(self) -> tuple[bytes, bytes]:
        """(resume data of a clean stop, piece layer), each empty if none fits. The file of resume data is deleted."""
        return await asyncio.to_thread(self._load_now)

    def _load_now(self) -> tuple[bytes, bytes]:
        resume = b""
        try:
            kept = msgspec.msgpack.decode(self._resume.read_bytes(), type=prepared(_Resume))
            if kept.mtime_ns == self.path.stat().st_mtime_ns:
                resume = kept.data
        except (OSError, msgspec.DecodeError):
            pass
        self._resume.unlink(missing_ok=True)
        try:
            layer = self._layer.read_bytes()
        except OSError:
            layer = b""
        return resume, layer if self._torrent.has_layer(layer) else b""

    async def keep_layer(self, layer: bytes) -> None:
        """Keep the piece layer, whole or not at all."""
        await asyncio.to_thread(atomic_write, self._layer, layer)

    async def keep_resume(self, data: bytes) -> None:
        """Keep the resume data of a clean stop, if there is any; the part file must be flushed."""
        if not data:
            return
        await asyncio.to_thread(self._keep_resume_now, data)

    def _keep_resume_now(self, data: bytes) -> None:
        kept = _Resume(data, self.path.stat().st_mtime_ns)
        atomic_write(self._resume, msgspec.msgpack.encode(kept))

    async def forget(self, *, delete: bool) -> None:
        """Delete the companions, and with `delete` the part file too."""
        await asyncio.to_thread(self._forget_now, delete)

    def _forget_now(self, delete: bool) -> None:
        self._layer.unlink(missing_ok=True)
        self._resume.unlink(missing_ok=True)
        if delete:
            self.path.unlink(missing_ok=True)
