"""What every shard file of this node is at the moment: the only module that writes it down.

A file changes by a transition. Each is a compare-and-set: the caller passes the record that it saw (None if it saw
none), and nothing happens if the catalog has another one by now, or if the diagram has no such arrow. It is done
before it returns, on the event loop, so that no reader sees half of one.

    from          transition       to               when
    ------------  ---------------  ---------------  -----------------------------------------------------------
    absent        seen             hashing          the scanner found the file
    hashing       seen             hashing          it changed on disk, or belongs to another manifest
    seeding       seen             hashing          the same
    invalid       seen             hashing          the same
    hashing       admitted         seeding          the verifier found it whole, and it is seeded
    hashing       rejected         invalid          the verifier found it wrong
    seeding       rejected         invalid          the swarm, VERIFY or a second reading found it wrong
    downloading   rejected         invalid          it came as its manifest says, and its structure is wrong
    absent        fetch_started    downloading      a fetch begins, after it set aside what was at the path
    hashing       fetch_started    downloading      the same, over a file that is not known to be the shard
    invalid       fetch_started    downloading      the same, over a wrong one
    downloading   fetch_finished   seeding          every byte is checked, and it is seeded
    downloading   fetch_failed     absent           the fetch ended without the file
    hashing       evicted          absent           this node deleted the file
    seeding       evicted          absent           the same
    invalid       evicted          absent           the same
    hashing       gone             absent           it was deleted or moved by others
    seeding       gone             absent           the same
    invalid       gone             absent           the same

While a file is downloading, the fetch alone changes its record. A shard that is loaded is a seeding file
whose shard `loaded_changed` named.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

from node.files import Fingerprint
from node.shards.store.manifests import LocalManifest
from node.swarm.torrent import Torrent
from protocol.commands.shards import FileState
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import Shard, ShardEntry, ShardKind, ShardRef, SignedManifest

K = TypeVar("K")
T = TypeVar("T")
RecordState = Literal["hashing", "seeding", "downloading", "invalid"]
Transition = Literal[
    "seen", "admitted", "rejected", "fetch_started", "fetch_finished", "fetch_failed", "evicted", "gone"
]


TRANSITIONS: Mapping[tuple[RecordState | Literal["absent"], Transition], RecordState | Literal["absent"]] = {
    ("absent", "seen"): "hashing",
    ("hashing", "seen"): "hashing",
    ("seeding", "seen"): "hashing",
    ("invalid", "seen"): "hashing",
    ("hashing", "admitted"): "seeding",
    ("hashing", "rejected"): "invalid",
    ("seeding", "rejected"): "invalid",
    ("downloading", "rejected"): "invalid",
    ("absent", "fetch_started"): "downloading",
    ("hashing", "fetch_started"): "downloading",
    ("invalid", "fetch_started"): "downloading",
    ("downloading", "fetch_finished"): "seeding",
    ("downloading", "fetch_failed"): "absent",
    ("hashing", "evicted"): "absent",
    ("seeding", "evicted"): "absent",
    ("invalid", "evicted"): "absent",
    ("hashing", "gone"): "absent",
    ("seeding", "gone"): "absent",
    ("invalid", "gone"): "absent",
}
"""The diagram above, as the catalog follows it; "absent" is the state of a path without a record."""


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One file; replaced by a transition, never changed."""

    path: Path
    state: RecordState
    kind: ShardKind | Literal["manifest"]
    fingerprint: Fingerprint | None
    """None while it is downloaded."""
    shard: Shard | None = None
    """None for a loose file until it is hashed, and for a manifest that is not in order."""
    error: str | None = None
    """Why it is invalid."""

    @property
    def torrent(self) -> Torrent | None:
        return torrent_of(self.shard.entry) if self.shard else None


@lru_cache(maxsize=65_536)
def torrent_of(entry: ShardEntry) -> Torrent:
    """The torrent that every node makes of this shard."""
    return Torrent.of(entry.filename, entry.size, entry.content_id)


class Catalog:
    """Files by path, shard and content; the manifests behind them; and the manifests with unannounced changes."""

    def __init__(self) -> None:
        self._files: dict[Path, ShardFile] = {}
        self._by_shard: defaultdict[ShardRef, set[Path]] = defaultdict(set)
        self._by_content: defaultdict[ContentId, set[Path]] = defaultdict(set)
        self._undecided: set[Path] = set()
        """Files that are hashing or downloading."""
        self._folders: dict[Path, LocalManifest] = {}
        self._manifests: defaultdict[ManifestDigest, dict[Path, SignedManifest]] = defaultdict(dict)
        """By digest: each folder with the manifest, and each file that is a shard of it -> the manifest as it was
        signed there.
        """
        self._loaded: dict[ManifestDigest, frozenset[int]] = {}
        self._unannounced: set[ManifestDigest] = set()
        self._has_unannounced = asyncio.Event()
        self._all_decided = asyncio.Event()
        self._all_decided.set()
        self._waiting: dict[Path | ShardRef, set[asyncio.Event]] = {}

    # What is known

    def get(self, path: Path) -> ShardFile | None:
        """The record of a path, to look at and to pass to a transition."""
        return self._files.get(path)

    def files(self) -> list[ShardFile]:
        return list(self._files.values())

    def of_shard(self, ref: ShardRef) -> list[ShardFile]:
        """The files that are, or should be, this shard: the good ones first."""
        return self._ordered(self._by_shard.get(ref, ()))

    def of_content(self, content_id: ContentId) -> list[ShardFile]:
        return self._ordered(self._by_content.get(content_id, ()))

    def _ordered(self, paths: Iterable[Path]) -> list[ShardFile]:
        return sorted((self._files[path] for path in paths), key=lambda file: (file.state != "seeding", file.path))

    def of_torrent(self, torrent: Torrent) -> list[ShardFile]:
        return [file for file in self.of_content(torrent.content_id) if file.torrent == torrent]

    def manifests(self) -> list[SignedManifest]:
        """The manifests that a folder here has, or of which a file here is a shard."""
        return [next(iter(places.values())) for places in self._manifests.values()]

    def manifest(self, digest: ManifestDigest) -> SignedManifest | None:
        places = self._manifests.get(digest)
        return next(iter(places.values())) if places else None

    def folder_of(self, digest: ManifestDigest) -> Path | None:
        """The folder of this manifest's shards, if one here has it."""
        return next((path for path in self._manifests.get(digest, ()) if path in self._folders), None)

    def folders(self) -> dict[Path, LocalManifest]:
        """The folders that have a manifest."""
        return dict(self._folders)

    def manifest_in(self, folder: Path) -> LocalManifest | None:
        return self._folders.get(folder)

    def on_disk(self, digest: ManifestDigest) -> frozenset[int]:
        """Shards of a manifest that are here, checked, and seeded."""
        return self._with_file(digest, "seeding")

    def fetching(self, digest: ManifestDigest) -> frozenset[int]:
        """Shards of a manifest that are on their way here."""
        return self._with_file(digest, "downloading") - self.on_disk(digest)

    def _with_file(self, digest: ManifestDigest, state: FileState) -> frozenset[int]:
        signed = self.manifest(digest)
        entries = signed.manifest.shards if signed else ()
        return frozenset(
            entry.shard_id
            for entry in entries
            if any(
                self._files[path].state == state for path in self._by_shard.get(ShardRef(digest, entry.shard_id), ())
            )
        )

    def loaded(self, digest: ManifestDigest) -> frozenset[int]:
        """Shards of a manifest that a stage has loaded."""
        return self._loaded.get(digest, frozenset())

    # What happens to a file. Each returns the new record, or None (False) if the caller's was out of date.

    def seen(
        self,
        known: ShardFile | None,
        path: Path,
        kind: ShardKind | Literal["manifest"],
        fingerprint: Fingerprint,
        shard: Shard | None = None,
    ) -> ShardFile | None:
        """The file is on disk with this fingerprint; what it holds is to be found out."""
        return self._replace("seen", known, ShardFile(path, "hashing", kind, fingerprint, shard))

    def admitted(self, known: ShardFile, shard: Shard) -> ShardFile | None:
        """The file is this shard, and seeded."""
        return self._replace("admitted", known, replace(known, state="seeding", shard=shard))

    def rejected(self, known: ShardFile, error: str, fingerprint: Fingerprint | None = None) -> ShardFile | None:
        """The file is wrong; `error` says why. `fingerprint`: of a file that has just come."""
        fingerprint = known.fingerprint or fingerprint
        return self._replace("rejected", known, replace(known, state="invalid", error=error, fingerprint=fingerprint))

    def fetch_started(self, known: ShardFile | None, path: Path, shard: Shard) -> ShardFile | None:
        """From now on a fetch writes this file, and no other part decides what it is."""
        return self._replace("fetch_started", known, ShardFile(path, "downloading", shard.entry.kind, None, shard))

    def fetch_finished(self, known: ShardFile, fingerprint: Fingerprint) -> ShardFile | None:
        """The file came, is checked, and seeded."""
        return self._replace("fetch_finished", known, replace(known, state="seeding", fingerprint=fingerprint))

    def fetch_failed(self, known: ShardFile) -> bool:
        """The file did not come."""
        return self._remove("fetch_failed", known)

    def evicted(self, known: ShardFile) -> bool:
        """This node deleted the file."""
        return self._remove("evicted", known)

    def gone(self, known: ShardFile) -> bool:
        """The file is not on disk any more, or is nothing to share."""
        return self._remove("gone", known)

    def _replace(self, transition: Transition, known: ShardFile | None, file: ShardFile) -> ShardFile | None:
        if not self._may(transition, known, file.path, file.state):
            return None
        self._unlink(known)
        self._files[file.path] = file
        if file.shard:
            self._by_shard[file.shard.ref].add(file.path)
            self._by_content[file.shard.entry.content_id].add(file.path)
            held = self._folders.get(file.path.parent)
            is_newer = held is not None and held.digest == file.shard.digest
            self._manifests[file.shard.digest][file.path] = held.signed if held and is_newer else file.shard.signed
        self._changed(file.path, known, file)
        return file

    def _remove(self, transition: Transition, known: ShardFile) -> bool:
        if not self._may(transition, known, known.path, "absent"):
            return False
        self._unlink(known)
        del self._files[known.path]
        self._changed(known.path, known, None)
        return True

    def _may(self, transition: Transition, known: ShardFile | None, path: Path, after: str) -> bool:
        """The comparison of the compare-and-set: records are compared by identity, for each is made once."""
        before = known.state if known else "absent"
        return self._files.get(path) is known and TRANSITIONS.get((before, transition)) == after

    def _unlink(self, file: ShardFile | None) -> None:
        if file is None or file.shard is None:
            return
        _discard(self._by_shard, file.shard.ref, file.path)
        _discard(self._by_content, file.shard.entry.content_id, file.path)
        self._release(file.shard.digest, file.path)

    def _changed(self, path: Path, before: ShardFile | None, after: ShardFile | None) -> None:
        if after and after.state in ("hashing", "downloading"):
            self._undecided.add(path)
            self._all_decided.clear()
        else:
            self._undecided.discard(path)
            if not self._undecided:
                self._all_decided.set()
        shards = {file.shard.ref for file in (before, after) if file and file.shard}
        self._wake(path, *shards)
        self.announce_again(ref.digest for ref in shards)

    # What happens to a manifest, and to what a stage has

    def manifest_held(self, known: LocalManifest | None, held: LocalManifest) -> bool:
        """The folder has this manifest now; `known` is what `folders()` said of it. False if that is out of date."""
        if self._folders.get(held.folder) is not known:
            return False
        self._release_folder(known)
        self._folders[held.folder] = held
        places = self._manifests[held.digest]
        places[held.folder] = held.signed
        for path in places:
            if path.parent == held.folder:  # the same content signed again, with origins that it did not name before
                places[path] = held.signed
        return True

    def manifest_released(self, known: LocalManifest) -> bool:
        """The folder does not have this manifest any more. False if it was replaced or released meanwhile."""
        if self._folders.get(known.folder) is not known:
            return False
        self._release_folder(known)
        return True

    def _release_folder(self, held: LocalManifest | None) -> None:
        if held:
            del self._folders[held.folder]
            self._release(held.digest, held.folder)
            self.announce_again([held.digest])

    def _release(self, digest: ManifestDigest, path: Path) -> None:
        places = self._manifests[digest]
        del places[path]
        if not places:
            del self._manifests[digest]

    def loaded_changed(self, digest: ManifestDigest, known: frozenset[int], shard_ids: frozenset[int]) -> bool:
        """A stage has exactly these shards loaded now; `known` is what `loaded()` said. False if that is out of date,
        or nothing changed.
        """
        if self.loaded(digest) != known or known == shard_ids:
            return False
        if shard_ids:
            self._loaded[digest] = shard_ids
        else:
            del self._loaded[digest]
        self.announce_again([digest])
        return True

    # What is to be announced

    def take_unannounced(self) -> set[ManifestDigest]:
        """Manifests whose shards, or loaded shards, changed since the last call."""
        unannounced, self._unannounced = self._unannounced, set()
        self._has_unannounced.clear()
        return unannounced

    def has_unannounced(self) -> bool:
        return bool(self._unannounced)

    def announce_again(self, digests: Iterable[ManifestDigest]) -> None:
        """Something of these manifests is to be announced."""
        self._unannounced.update(digests)
        if self._unannounced:
            self._has_unannounced.set()

    async def wait_unannounced(self) -> None:
        """Wait until there is something to announce."""
        await self._has_unannounced.wait()

    # Who waits

    async def wait_for(self, path: Path, until: Callable[[ShardFile | None], bool]) -> ShardFile | None:
        """Wait until the record of this path is as `until` says. Woken by changes of this path alone."""
        await self._wait(path, lambda: until(self.get(path)))
        return self.get(path)

    async def wait_for_shard(self, ref: ShardRef) -> list[ShardFile]:
        """Wait until none of the shard's files is being hashed; returns them, the good ones first."""
        await self._wait(ref, lambda: all(file.state != "hashing" for file in self.of_shard(ref)))
        return self.of_shard(ref)

    @property
    def is_idle(self) -> bool:
        """Whether every file is seeded or invalid: none is being hashed or downloaded."""
        return not self._undecided

    async def wait_idle(self) -> None:
        await self._all_decided.wait()

    async def _wait(self, key: Path | ShardRef, condition: Callable[[], bool]) -> None:
        while not condition():
            changed = asyncio.Event()
            self._waiting.setdefault(key, set()).add(changed)
            try:
                await changed.wait()
            finally:
                _discard(self._waiting, key, changed)

    def _wake(self, *keys: Path | ShardRef) -> None:
        for key in keys:
            for changed in self._waiting.get(key, ()):
                changed.set()


def _discard(index: dict[K, set[T]], key: K, item: T) -> None:
    items = index.get(key)
    if items is not None:
        items.discard(item)
        if not items:
            del index[key]
