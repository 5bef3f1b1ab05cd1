"""Shards straight from an origin, without a node: one download for all processes of the machine."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from node.origin.layout import is_address, shard_key, split_address
from node.origin.origins import Origins
from node.origin.policy import check_host, refusal
from node.origin.url import OriginUrl
from protocol.content import hash_file
from protocol.errors import OriginCorruptError, OriginError, OriginNotFoundError, ShoalError, UnknownNameError
from protocol.manifest import Manifest, ShardEntry, SignedManifest, safe_filename
from torch_bridge.loop import loop_thread
from torch_bridge.o3_client import O3Client
from torch_bridge.place import with_secrets
from torch_bridge.shards.disk import require_space
from torch_bridge.shards.integrity import check_parquet
from torch_bridge.shards.locks import locked
from torch_bridge.shards.ranged_file import download
from torch_bridge.shards.source import FetchedFile, OnProgress
from torch_bridge.stores import Store

log = logging.getLogger(__name__)
MAX_SET_ASIDE = 3
"""Wrong files of one shard that are kept to be looked at."""


class _Checked(msgspec.Struct, frozen=True):
    """A file that had this content id when it was last hashed."""

    content_id: str
    size: int
    mtime_ns: int
    inode: int


class OriginSource:
    """A data set by its name at an origin (`where` "o3://bucket/prefix", `dataset` "owner/name"), or by the URL of its
    manifest (`where` alone). Shards lie in `folder`, under their file names.

    `keep_free_bytes`: a download that would leave less is not begun.
    """

    def __init__(
        self, where: str, folder: Path | str, *, dataset: str | None = None, client: O3Client | None = None,
        keep_free_bytes: int = 0,
    ) -> None:  # fmt: skip
        self.where, self.dataset = where, dataset
        self._folder = Path(folder)
        self._client = client or O3Client()
        self._keep_free_bytes = keep_free_bytes
        self._signed: SignedManifest | None = None
        self._guard = threading.Lock()

    @property
    def folder(self) -> Path:
        return self._folder

    def manifest(self) -> Manifest:
        """The newest valid manifest, its signature and digest checked; read once in each source.

        Raises UnknownNameError, InvalidManifestError, InvalidParamsError, OriginError.
        """
        return self._signed_manifest().manifest

    def fetch(
        self, entry: ShardEntry, *, stop: threading.Event | None = None, on_progress: OnProgress | None = None
    ) -> FetchedFile:
        began = time.monotonic()
        path = self._path(entry)
        self._state.mkdir(parents=True, exist_ok=True)
        with locked(self._lock(entry), stop):
            if self._is_here(entry, path):
                return FetchedFile(path, "local", time.monotonic() - began)
            part = path.with_name(f"{path.name}.part")
            have = part.stat().st_size if part.exists() else 0
            require_space(self._folder, max(entry.size - have, 0), self._keep_free_bytes, entry.filename)
            moved = self._bring(entry, part, stop, on_progress)
            os.replace(part, path)
            _sync_folder(self._folder)
            self._remember(entry, path)
            return FetchedFile(path, "origin", time.monotonic() - began, {"origin": moved})

    def distrust(self, entry: ShardEntry, why: str) -> None:
        with locked(self._lock(entry)):
            log.warning("%s is set aside: %s", entry.filename, why)
            self._set_aside(self._path(entry))
            self._stamp(entry).unlink(missing_ok=True)

    def discard(self, entry: ShardEntry) -> bool:
        with locked(self._lock(entry)):
            self._path(entry).unlink(missing_ok=True)
            self._stamp(entry).unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Let go of this process's connections."""
        self._client.close()

    # Where things lie

    @property
    def _state(self) -> Path:
        return self._folder / ".shards"

    def _path(self, entry: ShardEntry) -> Path:
        return self._folder / safe_filename(entry.filename)

    def _lock(self, entry: ShardEntry) -> Path:
        return self._state / f"{safe_filename(entry.filename)}.lock"

    def _stamp(self, entry: ShardEntry) -> Path:
        return self._state / f"{safe_filename(entry.filename)}.checked"

    def _is_here(self, entry: ShardEntry, path: Path) -> bool:
        """Whether the whole file is there and right; a wrong one is set aside."""
        try:
            seen = path.stat()
        except FileNotFoundError:
            return False
        now = _Checked(entry.content_id, seen.st_size, seen.st_mtime_ns, seen.st_ino)
        with contextlib.suppress(FileNotFoundError, msgspec.MsgspecError):
            if msgspec.json.decode(self._stamp(entry).read_bytes(), type=_Checked) == now:
                return True
        if seen.st_size == entry.size and hash_file(path).content_id == entry.content_id:
            self._remember(entry, path)
            return True
        log.warning("%s is not the shard of this name in the manifest: it is set aside, and fetched", path)
        self._set_aside(path)
        return False

    def _remember(self, entry: ShardEntry, path: Path) -> None:
        seen = path.stat()
        checked = _Checked(entry.content_id, seen.st_size, seen.st_mtime_ns, seen.st_ino)
        new = self._stamp(entry).with_suffix(".new")
        new.write_bytes(msgspec.json.encode(checked))
        os.replace(new, self._stamp(entry))

    def _set_aside(self, path: Path) -> None:
        for number in range(1, MAX_SET_ASIDE + 1):
            aside = path.with_name(f"{path.name}.bad-{number}")
            if not aside.exists():
                with contextlib.suppress(FileNotFoundError):
                    os.replace(path, aside)
                return
        path.unlink(missing_ok=True)

    # From where they come

    def _bring(self, entry: ShardEntry, part: Path, stop: threading.Event | None, tell: OnProgress | None) -> int:
        """Have the whole, checked shard in `part`, from the first origin that has it; bytes moved."""
        failure: ShoalError | None = None
        moved_in_all = 0
        for store in self._stores():
            for _ in range(2):  # what an earlier run left may be wrong: then once more from the beginning
                resumed = part.exists() and part.stat().st_size > 0
                try:
                    found, moved = download(store, shard_key(entry.content_id), entry, part, stop, tell)
                except OriginError as err:
                    failure = failure if failure is not None and failure.retryable else err
                    break
                moved_in_all += moved
                if found == entry.content_id:
                    if entry.kind == "parquet":
                        check_parquet(part)
                    return moved_in_all
                self._set_aside_part(part)
                failure = OriginCorruptError(
                    f"{entry.filename} from {store.url} has content id {found}; the manifest says {entry.content_id}: "
                    "publish it again, or name another origin",
                    {"origin": store.url, "key": shard_key(entry.content_id), "status": "", "tried": 1},
                )
                log.warning("%s", failure)
                if not resumed:
                    break
        raise failure or OriginNotFoundError(f"no origin is named for {entry.filename}")

    def _set_aside_part(self, part: Path) -> None:
        whole = part.with_suffix("")
        os.replace(part, aside := whole.with_name(f"{whole.name}.wrong"))
        for number in range(1, MAX_SET_ASIDE + 1):
            bad = whole.with_name(f"{whole.name}.bad-{number}")
            if not bad.exists():
                os.replace(aside, bad)
                return
        aside.unlink()

    def _stores(self) -> list[Store]:
        """Of the origins: the given one first, then those of the manifest that a stranger may name."""
        signed = self._signed_manifest()
        base = self._base
        stores = [self._client.at(base)]
        for url in signed.origins:
            known = str(OriginUrl.parse(url))
            if known == base:
                continue
            try:
                if why := refusal(known):
                    raise OriginNotFoundError(why)
                loop_thread().run(check_host(known))
            except ShoalError as err:
                log.info("origin %s of manifest %s is not asked: %s", url, signed.manifest.name, err)
                continue
            stores.append(self._client.at(known))
        return stores

    @property
    def _base(self) -> str:
        by_url = self.dataset is None
        return str(OriginUrl.parse(split_address(self.where)[0] if by_url else self.where))

    def _signed_manifest(self) -> SignedManifest:
        with self._guard:
            if self._signed is None:
                settings = with_secrets(self._client.settings, self.where.partition("://")[0])
                settings = replace(settings, origins=(self._base,))
                self._signed = loop_thread().run(self._client.retry.run(lambda _: self._read(settings)))
            return self._signed

    async def _read(self, settings: Any) -> SignedManifest:
        async with Origins.open(settings) as origins:
            if self.dataset is None:
                return await origins.manifest_at(self.where)
            if is_address(self.dataset):
                return await origins.manifest_at(self.dataset)
            found = await origins.find_manifests(None, self.dataset)
        if not found:
            raise UnknownNameError(
                f"origin {self._base} has no data set {self.dataset!r}: publish it there with --origin, or name its "
                "manifest's URL"
            )
        return found[0]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_guard"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _guard=threading.Lock())


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
