"""NodeSource: shards through this machine's node, from peers first, one download for all processes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from protocol.client import NotificationCallback
from protocol.commands.leases import ReleaseResult, RenewResult
from protocol.commands.shards import GetManifestResult, ListFilesResult, ShardResult
from protocol.commands.tasks import VerifyShardResult
from protocol.errors import (
    CancelledRequestError,
    InvalidShardError,
    ShardNotFoundError,
    ShoalError,
    UnreachableError,
)
from protocol.manifest import Manifest, ShardEntry
from protocol.sync_client import SyncClient
from torch_bridge.core.folders import user_folder
from torch_bridge.shards.shard_file import as_published, check_parquet
from torch_bridge.shards.sources.interface import FetchedFile, OnProgress

log = logging.getLogger(__name__)
R = TypeVar("R")
_RECONNECT_S = 60.0
"""For so long one call waits for a node that is gone."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
_ANSWER_S = 10.0
"""For so long a node may take for a call that moves no bytes."""
_LOOK_S = 0.2
"""Seconds between two checks whether a fetch is still wanted."""


class NodeSource:
    """A data set of the node at `address` ("127.0.0.1:7400"), which must be on this machine: its files are read here.

    Every shard that was fetched is held by a lease of this process until `discard` or `close`; the lease is renewed in
    the background and ends `ttl_s` after this process is gone. `folder` is only for the ledger of readers; None: one of
    this user's own in the temporary folder.
    """

    def __init__(
        self,
        address: str,
        dataset: str,
        folder: Path | str | None = None,
        *,
        ttl_s: float = 120.0,
        reconnect_s: float = _RECONNECT_S,
    ) -> None:
        self.address, self.dataset = address, dataset
        mark = hashlib.sha256(f"{address} {dataset}".encode()).hexdigest()[:16]
        self._folder = Path(folder) if folder else user_folder(mark)
        self._ttl_s, self._reconnect_s = ttl_s, reconnect_s
        self._begin()

    def _begin(self) -> None:
        self._process = 0
        self._guard = threading.Lock()
        self._releasing = threading.Lock()
        """Held while a lease is renewed and while one is released: never both for one shard."""
        self._local = threading.local()
        self._clients: list[tuple[threading.Thread, SyncClient]] = []
        self._held: dict[int, ShardEntry] = {}
        self._closed = threading.Event()
        self._manifest: Manifest | None = None
        self._lease = ""

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def ledger_folder(self) -> Path | None:
        return self._folder

    def manifest(self) -> Manifest:
        if self._manifest is None:
            found = self._call("GET_MANIFEST", {"dataset": self.dataset}, GetManifestResult)
            self._manifest = found.signed.manifest
        return self._manifest

    def fetch(
        self, entry: ShardEntry, *, stop: threading.Event | None = None, on_progress: OnProgress | None = None
    ) -> FetchedFile:
        self._in_this_process()

        def tell(_: str, params: Any) -> None:
            if stop is not None and stop.is_set():
                raise CancelledRequestError(f"the fetching of {entry.filename} was stopped here")
            if on_progress and isinstance(params, dict) and "bytes_done" in params:
                on_progress(int(params["bytes_done"]), int(params["bytes_total"]))

        for _ in range(2):
            params = self._shard(entry) | {"ttl_s": self._ttl_s}
            found = self._call("FETCH_SHARD", params, ShardResult, tell=tell, stop=stop)
            with self._guard:
                self._held[entry.shard_id] = entry
            path = Path(found.path)
            try:
                if entry.kind == "parquet":
                    check_parquet(path)
                return FetchedFile(path, found.source, found.seconds, found.bytes_by_source)
            except InvalidShardError as err:
                failure = as_published(entry, err.message)
            except OSError as err:
                failure = InvalidShardError(
                    f"{path} of the node at {self.address} cannot be read here ({err.strerror}): train on the machine "
                    "of that node, as a user who may read its files, or give an origin and a folder to open_source"
                )
            if not self.distrust(entry, failure.message):
                break
        with contextlib.suppress(ShoalError):
            self.discard(entry)
        raise failure

    def distrust(self, entry: ShardEntry, why: str) -> bool:
        """The node hashes its file again, and sets a wrong one aside."""
        log.warning("%s is verified again by the node at %s: %s", entry.filename, self.address, why)
        params = {"task_type": "verify_shard", "dataset": self.dataset, "shard_id": entry.shard_id}
        try:
            return not self._call("EXECUTE_TASK", params, VerifyShardResult).valid
        except ShardNotFoundError:
            return True

    def on_disk(self, entries: Sequence[ShardEntry]) -> list[ShardEntry]:
        found = self._call("LIST_FILES", {}, ListFilesResult)
        here = {(file.dataset, file.content_id) for file in found.files}
        return [entry for entry in entries if (self.manifest().name, entry.content_id) in here]

    def cost_bytes(self, size_bytes: int) -> int:
        """Its size: the file is the node's, and counts while a lease of the run holds it."""
        return size_bytes

    def disk_use(self) -> None:
        """The folder is only for the ledger of readers."""

    def discard(self, entry: ShardEntry) -> bool:
        """As ShardSource. A shard that is pinned at this node stays there, and the result is True."""
        return all(shard.gone or shard.published or shard.pinned for shard in self._released(entry, evict=True).shards)

    def release(self, entry: ShardEntry) -> None:
        with contextlib.suppress(ShoalError):  # a lease that is not renewed ends by itself
            self._released(entry, evict=False)

    def _released(self, entry: ShardEntry, *, evict: bool) -> ReleaseResult:
        self._in_this_process()
        with self._releasing:
            with self._guard:
                self._held.pop(entry.shard_id, None)
            params = self._shard(entry) | {"evict": evict}
            return self._call("RELEASE", params, ReleaseResult, patience_s=0.0, answer_s=_ANSWER_S)

    def close(self) -> None:
        """Release the lease; the files stay with the node, which may evict them."""
        if self._process == os.getpid() and not self._closed.is_set():
            self._closed.set()
            is_alone = self._releasing.acquire(timeout=_LOOK_S * 5)  # of the renewal, which stops by `_closed`
            try:
                with contextlib.suppress(ShoalError), self._connect() as client:
                    client.call("RELEASE", {"lease": self._lease}, timeout_s=5)
            finally:
                if is_alone:
                    self._releasing.release()
        self._hang_up()

    def _hang_up(self) -> None:
        """Close the connections of all threads; in a forked child this closes none of its parent's."""
        clients, self._clients = self._clients, []
        for _, client in clients:
            client.close()

    # The lease

    def _shard(self, entry: ShardEntry) -> dict[str, Any]:
        return {"dataset": self.dataset, "shard_id": entry.shard_id, "lease": self._lease}

    def _in_this_process(self) -> None:
        """A lease and a renewing thread of this process's own, also after a fork."""
        with _beginning:
            if self._process == os.getpid() and not self._closed.is_set():
                return
            manifest = self._manifest
            self._hang_up()
            self._begin()
            self._manifest, self._process = manifest, os.getpid()
            self._lease = f"{socket.gethostname()[:60]}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
            threading.Thread(target=self._renew, args=(self._closed,), name="shard-leases", daemon=True).start()

    def _renew(self, closed: threading.Event) -> None:
        while not closed.wait(self._ttl_s / 3):
            try:
                self._renew_once(closed)
            except ShoalError as err:
                if not closed.is_set():
                    log.warning("the lease at the node %s was not renewed: %s", self.address, err)

    def _renew_once(self, closed: threading.Event) -> None:
        answer_s = min(_ANSWER_S, self._ttl_s)
        params = {"lease": self._lease, "ttl_s": self._ttl_s}
        known = self._call(
            "RENEW", params, RenewResult, stop=closed, patience_s=self._ttl_s / 3, answer_s=answer_s
        ).shards
        with self._guard:
            lost = self._held.keys() - {shard.shard_id for shard in known}
        for number in lost:  # the node was restarted: shards that it still has are leased again, and no byte moves
            with self._releasing:
                with self._guard:
                    entry = self._held.get(number)
                if entry is not None:
                    params = self._shard(entry) | {"ttl_s": self._ttl_s, "wait": False}
                    self._call("FETCH_SHARD", params, ShardResult, stop=closed, patience_s=0.0, answer_s=answer_s)
            closed.wait(0.001)  # a thread that waits to release one comes first

    # The connection: one a thread

    def _connect(self) -> SyncClient:
        host, _, port = self.address.rpartition(":")
        client = SyncClient(host.strip("[]"), int(port))
        with self._guard:
            for thread, other in self._clients:
                if not thread.is_alive():  # of an epoch that is over
                    other.close()
            self._clients = [one for one in self._clients if not one[1].is_closed]
            self._clients.append((threading.current_thread(), client))
        return client

    def _call(
        self,
        method: str,
        params: dict[str, Any],
        result: type[R],
        *,
        tell: NotificationCallback | None = None,
        stop: threading.Event | None = None,
        patience_s: float | None = None,
        answer_s: float | None = None,
    ) -> R:
        """Call the node; wait up to `patience_s` for one that is gone. `answer_s`: the limit of one answer.

        Raises the node's error, UnreachableError or TimedOutError in the end, CancelledRequestError after `stop`.
        """
        patience_s = self._reconnect_s if patience_s is None else patience_s
        began, pause_s = time.monotonic(), _FIRST_PAUSE_S
        while True:
            if stop is not None and stop.is_set():
                raise CancelledRequestError(f"{method} was stopped here")
            kept = getattr(self._local, "client", None)
            is_new = kept is None or kept[0] != os.getpid()
            try:
                if is_new:
                    self._local.client = os.getpid(), self._connect()
                client: SyncClient = self._local.client[1]
                with _interrupted_by(stop, client):
                    return client.call(method, params, result_type=result, on_notification=tell, timeout_s=answer_s)
            except UnreachableError as err:
                self._local.client = None
                if not is_new:
                    continue  # the node was restarted since this connection was used: try a new one
                if time.monotonic() - began + pause_s > patience_s:
                    raise UnreachableError(
                        f"the node at {self.address} did not come back within {patience_s:g} s: {err.message}"
                    ) from None
                (stop or self._closed).wait(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("address", "dataset", "_folder", "_ttl_s", "_reconnect_s")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


_beginning = threading.Lock()


def _after_fork() -> None:
    global _beginning
    _beginning = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def _interrupted_by(stop: threading.Event | None, client: SyncClient) -> Iterator[None]:
    """While this is open, `stop` interrupts the client's call, even if the node sends nothing."""
    if stop is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK_S):
            if stop.is_set():
                client.interrupt()
                return

    watcher = threading.Thread(target=watch, name="shard-stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
