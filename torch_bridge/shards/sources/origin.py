"""OriginSource: shards straight from an origin, without a node, by one download for all processes of the machine."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import psutil

from node.files import PART_SUFFIX, FileLock, atomic_write, part_path, replace_file
from node.origin.layout import shard_key
from protocol.content import hash_file
from protocol.errors import InvalidShardError, OriginCorruptError, OriginError, OriginNotFoundError
from protocol.manifest import Manifest, ShardEntry, safe_filename
from protocol.structs import prepared
from torch_bridge.core.client import O3Client
from torch_bridge.core.folders import home_of, writing_to
from torch_bridge.core.store import Store
from torch_bridge.shards.disk_space import (
    BLOCK_BYTES,
    allocated_bytes,
    blocks,
    disk_full_errors,
    release,
    reserve,
)
from torch_bridge.shards.shard_file import as_published, check_parquet
from torch_bridge.shards.sources.dataset_origins import DatasetOrigins
from torch_bridge.shards.sources.interface import DiskUse, FetchedFile, OnProgress
from torch_bridge.shards.sources.range_download import download

log = logging.getLogger(__name__)
_STATE, _LOCK, _CHECKED = ".shards", ".lock", ".checked"
MAX_SET_ASIDE = 3
"""Wrong files of one shard that are kept for inspection."""


class _Checked(msgspec.Struct, frozen=True):
    """A file that had this content id when it was last hashed, and whether it was fetched to be deleted again.

    Downloads are not synced to the disk, so a file that was checked before the machine was last started is hashed
    again: a power cut may have left it with other bytes.
    """

    content_id: str
    size: int
    mtime_ns: int
    inode: int
    boot: str
    deletable: bool = False
    """Whether a source fetched it that deletes. A file without this is somebody's own, and stays."""

    def is_of(self, seen: os.stat_result) -> bool:
        """Whether the file is still the one that was checked."""
        return (self.size, self.mtime_ns, self.inode) == (seen.st_size, seen.st_mtime_ns, seen.st_ino)


class OriginSource:
    """A data set by its name at an origin (`where` "o3://bucket/prefix", `dataset` "owner/name"), or by the URL of its
    manifest (`where` alone). Shards go to `folder`, under their file names; those of a second data set in the same
    folder go to one of its own in there.

    `keep_free_bytes`: a download that would leave less free is not begun. `deletes`: whether `discard` deletes what
    such sources fetched, in this process or an earlier one; with False, what this one fetches or finds there stays,
    also for other runs. A file that lay in the folder before is never deleted.
    """

    def __init__(
        self,
        where: str,
        folder: Path | str,
        *,
        dataset: str | None = None,
        client: O3Client | None = None,
        keep_free_bytes: int = 0,
        deletes: bool = True,
    ) -> None:
        self._folder = Path(folder)
        self._deletes = deletes
        self._unwritten: dict[str, _Checked] = {}
        """Records that a full disk did not take, by file name."""
        self._keep_free_bytes = keep_free_bytes
        self._origins = DatasetOrigins(where, dataset, client or O3Client(), self._folder / _STATE)
        self._home: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the shards go. Raises as `manifest` does, and InvalidParamsError for one that cannot be written."""
        if self._home is None:
            with disk_full_errors(self._folder):
                self._home = home_of(self.manifest().name, self._folder, self._folder / _STATE)
        return self._home

    @property
    def ledger_folder(self) -> Path | None:
        return self.folder

    def manifest(self) -> Manifest:
        """The newest valid manifest; if the origin does not answer, the one that was last read into this folder.

        Raises UnknownNameError, InvalidManifestError, InvalidParamsError, OriginError.
        """
        return self._origins.signed().manifest

    def fetch(
        self, entry: ShardEntry, *, stop: threading.Event | None = None, on_progress: OnProgress | None = None
    ) -> FetchedFile:
        began = time.monotonic()
        path = self._path(entry)
        with writing_to(self.folder, "folder"):
            self._state.mkdir(parents=True, exist_ok=True)
        with writing_to(self.folder, "folder"), FileLock(self._lock(entry)).held(stop):
            if self._is_here(entry, path):
                return FetchedFile(path, "local", time.monotonic() - began)
            part = self._part(entry)
            try:
                moved = self._bring(entry, part, stop, on_progress)
            except BaseException:
                release(part)
                raise
            # Before it has its name: killed in between, the next fetch finds a part file, and not an unknown file.
            self._remember(entry, part, deletable=self._deletes)
            replace_file(part, path)
            return FetchedFile(path, "origin", time.monotonic() - began, {"origin": moved})

    def distrust(self, entry: ShardEntry, why: str) -> bool:
        path = self._path(entry)
        with FileLock(self._lock(entry)).held():
            try:
                if hash_file(path).content_id == entry.content_id:
                    log.warning("%s has the bytes that were published, and is distrusted: %s", path, why)
                    return False
            except FileNotFoundError:
                return True
            except OSError as err:
                why = f"{why}; {err}"
            log.warning("%s is set aside: %s", path, why)
            self._set_wrong_aside(entry, path)
            return True

    def on_disk(self, entries: Sequence[ShardEntry]) -> list[ShardEntry]:
        return [entry for entry in entries if self._path(entry).exists()]

    def cost_bytes(self, size_bytes: int) -> int:
        """Whole blocks, with the note of the check, and the moment at which that is written once more."""
        return blocks(size_bytes) + 2 * BLOCK_BYTES

    def disk_use(self) -> DiskUse:
        names = self._names
        shards: dict[str, int] = {}
        parts: dict[str, int] = {}
        noted: dict[str, int] = {}
        other = 0
        for folder, found in _files(self.folder):
            if folder == self._state and found.name.endswith(_LOCK):
                continue  # empty, and one for each shard that was ever here
            size, top, name = allocated_bytes(found), folder == self.folder, found.name
            if top and name in names:
                shards[name] = size
            elif top and name.removesuffix(PART_SUFFIX) in names:
                parts[name.removesuffix(PART_SUFFIX)] = size
            elif folder == self._state and name.removesuffix(_CHECKED) in names:
                noted[name.removesuffix(_CHECKED)] = size
            else:
                other += size
        for name, size in noted.items():
            where = shards if name in shards else parts
            where[name] = where.get(name, 0) + size
        return DiskUse(shards, parts, other)

    def discard(self, entry: ShardEntry) -> bool:
        path = self._path(entry)
        with FileLock(self._lock(entry)).held():
            self._part(entry).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                record = self._record_of(entry, path.stat())
                if self._deletes and record and record.deletable:
                    path.unlink()
                    self._forget(entry)
        return True

    def release(self, entry: ShardEntry) -> None:
        """Nothing is held: a file stays until it is discarded."""

    def close(self) -> None:
        """Close this process's connections."""
        self._origins.close()

    # Paths

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(entry.filename for entry in self.manifest().shards)

    @property
    def _state(self) -> Path:
        return self.folder / _STATE

    def _path(self, entry: ShardEntry) -> Path:
        return self.folder / safe_filename(entry.filename)

    def _part(self, entry: ShardEntry) -> Path:
        return part_path(self._path(entry))

    def _lock(self, entry: ShardEntry) -> Path:
        return self._state / f"{safe_filename(entry.filename)}{_LOCK}"

    def _stamp(self, entry: ShardEntry) -> Path:
        return self._state / f"{safe_filename(entry.filename)}{_CHECKED}"

    def _is_here(self, entry: ShardEntry, path: Path) -> bool:
        """Whether the file is complete and right; a wrong one is set aside."""
        try:
            seen = path.stat()
        except FileNotFoundError:
            return False
        record = self._record_of(entry, seen)
        deletable = record is not None and record.deletable and self._deletes
        is_checked = record is not None and record.boot == _boot()
        if is_checked or (seen.st_size == entry.size and hash_file(path).content_id == entry.content_id):
            if not (is_checked and record and record.deletable == deletable):
                self._remember(entry, path, deletable=deletable)
            return True
        log.warning("%s is not the shard of this name in the manifest: it is set aside, and fetched", path)
        self._set_wrong_aside(entry, path)
        return False

    def _record_of(self, entry: ShardEntry, seen: os.stat_result) -> _Checked | None:
        """The record of the file as it is. None for one that was put in its place, or another data set's shard."""
        record = self._record(entry)
        return record if record and record.content_id == entry.content_id and record.is_of(seen) else None

    def _record(self, entry: ShardEntry) -> _Checked | None:
        """What was written last of a file of this name."""
        if unwritten := self._unwritten.get(entry.filename):
            return unwritten
        with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
            return msgspec.json.decode(self._stamp(entry).read_bytes(), type=prepared(_Checked))
        return None

    def _remember(self, entry: ShardEntry, path: Path, *, deletable: bool) -> None:
        seen = path.stat()
        record = _Checked(entry.content_id, seen.st_size, seen.st_mtime_ns, seen.st_ino, _boot(), deletable)
        try:
            atomic_write(self._stamp(entry), msgspec.json.encode(record))
            self._unwritten.pop(entry.filename, None)
        except OSError as err:  # the disk is full: the file is right, and is hashed once more at the next start
            self._unwritten[entry.filename] = record
            log.info("the check of %s is not recorded: %s", path, err)

    def _forget(self, entry: ShardEntry) -> None:
        self._unwritten.pop(entry.filename, None)
        self._stamp(entry).unlink(missing_ok=True)

    def _set_wrong_aside(self, entry: ShardEntry, path: Path) -> None:
        """A file that is somebody's own is kept however many there are."""
        with contextlib.suppress(FileNotFoundError):
            record, seen = self._record(entry), path.stat()
            is_fetched = record is not None and record.deletable and record.inode == seen.st_ino
            self._set_aside(path, path.name, always=not is_fetched)
        self._forget(entry)

    def _set_aside(self, path: Path, name: str, *, always: bool = False) -> None:
        """Keep a wrong file beside the right one, up to MAX_SET_ASIDE of them unless it is `always` kept."""
        for number in itertools.count(1) if always else range(1, MAX_SET_ASIDE + 1):
            aside = self.folder / f"{name}.bad-{number}"
            if not aside.exists():
                with contextlib.suppress(FileNotFoundError):
                    replace_file(path, aside)
                return
        path.unlink(missing_ok=True)

    # Downloads

    def _bring(self, entry: ShardEntry, part: Path, stop: threading.Event | None, tell: OnProgress | None) -> int:
        """Download a shard, checked, into `part`, from the first origin that has it. Returns the bytes moved."""
        failure: OriginError | None = None
        moved_in_all = 0
        for store in self._origins.stores():
            for _ in range(2):  # bytes of an earlier run may be wrong: then once more from the beginning
                reserve(part, entry.size, self._keep_free_bytes, entry.filename)
                resumed = part.stat().st_size > 0
                try:
                    found, moved = self._download(store, entry, part, stop, tell)
                except OriginError as err:
                    failure = failure if failure is not None and failure.retryable else err
                    break
                moved_in_all += moved
                if found == entry.content_id:
                    self._check(entry, part)
                    return moved_in_all
                self._set_aside(part, self._path(entry).name)
                failure = OriginCorruptError(
                    f"{entry.filename} from {store.url} has content id {found}; the manifest says {entry.content_id}: "
                    "publish it again, or name another origin",
                    {"origin": store.url, "key": shard_key(entry.content_id), "status": "", "tried": 1},
                )
                log.warning("%s", failure)
                if not resumed:
                    break
        raise failure or OriginNotFoundError(f"no origin is named for {entry.filename}")

    def _download(
        self, store: Store, entry: ShardEntry, part: Path, stop: threading.Event | None, tell: OnProgress | None
    ) -> tuple[str, int]:
        """By its content id, as `publish` writes it, or by its file name, as other tools do."""
        try:
            return download(store, shard_key(entry.content_id), entry, part, stop, tell)
        except OriginNotFoundError as err:
            try:
                return download(store, entry.filename, entry, part, stop, tell)
            except OriginNotFoundError:
                raise err from None

    def _check(self, entry: ShardEntry, part: Path) -> None:
        """Check a file whose content id is right: no origin has other bytes under it."""
        if entry.kind != "parquet":
            return
        try:
            check_parquet(part)
        except InvalidShardError as err:
            self._set_aside(part, self._path(entry).name)
            raise as_published(entry, err.message) from None


def _files(folder: Path) -> Iterator[tuple[Path, os.DirEntry[str]]]:
    """All files in a folder and below it, with the folder that each lies in."""
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(folder / entry.name)
        else:
            yield folder, entry


@functools.cache
def _boot() -> str:
    """An id of the machine's last start."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return str(psutil.boot_time())
