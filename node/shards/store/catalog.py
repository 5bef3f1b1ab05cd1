"""What every shard file of this node is at the moment: the only place where that is written down.

Every change is one method, called on the event loop and done before it returns, so nobody sees half of one.

    hashing ──> seeding <──> loaded        loaded: seeding, and a stage has it
       │  ^        │
       v  └────────┤ (changed on disk)
    invalid <──────┘
    downloading ──> seeding | invalid | forgotten
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

from node.shards.store.listing import Fingerprint
from node.shards.store.manifests import Holding
from node.swarm.torrent import Torrent
from protocol.commands.shards import FileState
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import ShardEntry

K = TypeVar("K")
Stage = Literal["hashing", "seeding", "downloading", "invalid"]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file; replaced, never changed."""

    path: Path
    state: Stage
    kind: str
    fingerprint: Fingerprint | None
    """None while it is downloaded."""
    holding: Holding | None = None
    """None for a loose file until it is hashed."""
    entry: ShardEntry | None = None
    error: str | None = None
    """Why it is invalid."""

    @property
    def torrent(self) -> Torrent | None:
        return torrent_of(self.entry) if self.entry else None


@lru_cache(maxsize=65_536)
def torrent_of(entry: ShardEntry) -> Torrent:
    """The torrent that every node makes of this shard."""
    return Torrent.of(entry.filename, entry.size, entry.content_id)


@dataclass(frozen=True, slots=True)
class HeldFolder:
    """A folder with a manifest in it."""

    holding: Holding
    fingerprint: Fingerprint
    """Of the manifest file."""


class Catalog:
    """Files by path, by shard and by content; the manifests behind them; and which manifests' news are untold."""

    def __init__(self) -> None:
        self._files: dict[Path, ShardFile] = {}
        self._by_shard: defaultdict[tuple[ManifestDigest, int], set[Path]] = defaultdict(set)
        self._by_content: defaultdict[ContentId, set[Path]] = defaultdict(set)
        self._folders: dict[Path, HeldFolder] = {}
        self._holdings: defaultdict[ManifestDigest, dict[Path, Holding]] = defaultdict(dict)
        self._loaded: dict[ManifestDigest, frozenset[int]] = {}
        self._untold: set[ManifestDigest] = set()
        self._changed = asyncio.Event()

    # What is known

    def get(self, path: Path) -> ShardFile | None:
        return self._files.get(path)

    def files(self) -> list[ShardFile]:
        return list(self._files.values())

    def of_shard(self, digest: ManifestDigest, shard_id: int) -> list[ShardFile]:
        """The files that are, or should be, this shard: the good ones first."""
        return self._ordered(self._by_shard.get((digest, shard_id), ()))

    def of_content(self, content_id: ContentId) -> list[ShardFile]:
        return self._ordered(self._by_content.get(content_id, ()))

    def _ordered(self, paths: Iterable[Path]) -> list[ShardFile]:
        return sorted((self._files[path] for path in paths), key=lambda file: (file.state != "seeding", file.path))

    def of_torrent(self, torrent: Torrent) -> list[ShardFile]:
        return [file for file in self.of_content(torrent.content_id) if file.torrent == torrent]

    def holdings(self) -> list[Holding]:
        return [next(iter(places.values())) for places in self._holdings.values()]

    def holding(self, digest: ManifestDigest) -> Holding | None:
        places = self._holdings.get(digest)
        return next(iter(places.values())) if places else None

    def folder_of(self, digest: ManifestDigest) -> Path | None:
        """Where the shards of this manifest lie, if a folder here has it."""
        places = self._holdings.get(digest, {})
        return next((place for place in places if place in self._folders), None)

    def folders(self) -> dict[Path, HeldFolder]:
        return dict(self._folders)

    def on_disk(self, digest: ManifestDigest) -> frozenset[int]:
        """Shards of a manifest that are here, checked, and seeded."""
        return self._with_file(digest, "seeding")

    def fetching(self, digest: ManifestDigest) -> frozenset[int]:
        """Shards of a manifest that are on their way here."""
        return self._with_file(digest, "downloading") - self.on_disk(digest)

    def _with_file(self, digest: ManifestDigest, state: FileState) -> frozenset[int]:
        holding = self.holding(digest)
        entries = holding.manifest.shards if holding else ()
        return frozenset(
            entry.shard_id
            for entry in entries
            if any(self._files[path].state == state for path in self._by_shard.get((digest, entry.shard_id), ()))
        )

    def loaded(self, digest: ManifestDigest) -> frozenset[int]:
        return self._loaded.get(digest, frozenset())

    # What happens

    def put(self, file: ShardFile) -> None:
        """The file is now this, whatever was known of its path before."""
        self._unlink(file.path)
        self._files[file.path] = file
        if file.holding and file.entry:
            self._by_shard[file.holding.digest, file.entry.shard_id].add(file.path)
            self._by_content[file.entry.content_id].add(file.path)
            self._holdings[file.holding.digest][file.path] = file.holding
            self._untold.add(file.holding.digest)
        self.pulse()

    def invalidate(self, file: ShardFile, error: str) -> None:
        self.put(replace(file, state="invalid", error=error))

    def forget(self, path: Path) -> None:
        """The file is no longer there."""
        self._unlink(path)
        self._files.pop(path, None)
        self.pulse()

    def hold_folder(self, folder: Path, held: HeldFolder) -> None:
        """The folder has this manifest now."""
        self.release_folder(folder)
        self._folders[folder] = held
        places = self._holdings[held.holding.digest]
        places[folder] = held.holding
        for place in places:
            if place.parent == folder:  # the same content signed anew, with origins that it did not name before
                places[place] = held.holding
        self.pulse()

    def release_folder(self, folder: Path) -> None:
        held = self._folders.pop(folder, None)
        if held:
            self._let_go(held.holding.digest, folder)
            self._untold.add(held.holding.digest)
            self.pulse()

    def set_loaded(self, digest: ManifestDigest, shard_ids: frozenset[int]) -> None:
        if shard_ids == self.loaded(digest):
            return
        if shard_ids:
            self._loaded[digest] = shard_ids
        else:
            self._loaded.pop(digest, None)
        self._untold.add(digest)
        self.pulse()

    def _unlink(self, path: Path) -> None:
        old = self._files.get(path)
        if old is None or old.holding is None or old.entry is None:
            return
        digest = old.holding.digest
        _discard(self._by_shard, (digest, old.entry.shard_id), path)
        _discard(self._by_content, old.entry.content_id, path)
        self._let_go(digest, path)
        self._untold.add(digest)

    def _let_go(self, digest: ManifestDigest, place: Path) -> None:
        places = self._holdings.get(digest)
        if places is not None:
            places.pop(place, None)
            if not places:
                del self._holdings[digest]

    # Who wants to know

    def take_untold(self) -> set[ManifestDigest]:
        """Manifests whose shards, or loaded shards, changed since the last call."""
        untold, self._untold = self._untold, set()
        return untold

    def untold(self) -> bool:
        return bool(self._untold)

    def tell_again(self, digests: Iterable[ManifestDigest]) -> None:
        """These could not be told."""
        self._untold.update(digests)
        self.pulse()

    def pulse(self) -> None:
        """Let `wait_until` look again; for others where a condition hangs on more than this catalog."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        while True:
            changed = self._changed
            if condition():
                return
            await changed.wait()


def _discard(index: dict[K, set[Path]], key: K, path: Path) -> None:
    paths = index.get(key)
    if paths is not None:
        paths.discard(path)
        if not paths:
            del index[key]
