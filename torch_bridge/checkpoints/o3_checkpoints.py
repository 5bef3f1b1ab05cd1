"""O3CheckpointManager: checkpoints at an origin and, with a node, in the swarm."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
from platformdirs import user_data_dir

from protocol.commands.publishing import PublishResult
from protocol.errors import InvalidParamsError, ShoalError
from protocol.ids import ContentId, NodeId
from protocol.signing import SigningKey
from protocol.sync_client import SyncClient
from torch_bridge.checkpoints.commit import Commit, checked_position, checked_run_id
from torch_bridge.checkpoints.parts import Part
from torch_bridge.checkpoints.restore import DAMAGE, CheckpointNotFoundError, commits, missing_part, read_state
from torch_bridge.checkpoints.rollback import StateOf, load_all
from torch_bridge.checkpoints.state import rng_state, set_rng_state
from torch_bridge.checkpoints.upload import Snapshot, own_folder, parts_of, take_snapshot, upload, write_files
from torch_bridge.core.client import O3Client
from torch_bridge.core.store import Store

log = logging.getLogger(__name__)

KEY_FILENAME = "checkpoints.key"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `load_checkpoint` found."""

    run_id: str
    epoch: int
    step: int | None
    extra: Any
    """As given to `save_checkpoint`."""
    state: Mapping[str, Any]
    """The states by member ("model", "optimizer", "scheduler", "loader", "rng"), tensors on the CPU."""
    key: str
    """The commit object's name at the origin."""
    digest: str
    fell_back_from: tuple[tuple[str, str], ...] = ()
    """Newer commits that were not complete: name, and why."""


class O3CheckpointManager:
    """Saves and restores checkpoints under one URL of an origin. Each call is made from one thread at a time.

    A save copies the state and returns; a thread sends it meanwhile. The memory of the copy is used again by the next
    one. A save that fails raises in the next call, in `wait` or in `close`. Nothing at an origin is written twice:
    parts are stored under their content ids, and the commit of a checkpoint is written last, so the newest valid commit
    is a complete checkpoint.
    """

    def __init__(
        self,
        url_or_store: str | Store,
        *,
        client: O3Client | None = None,
        key_file: Path | str | None = None,
        trusted: Collection[str] | None = None,
        node: str | None = None,
        cache_dir: Path | str | None = None,
    ) -> None:
        """Open, or create, the key that signs commits. Nothing is asked of the origin yet.

        Args:
            url_or_store: An origin's URL, or a store.
            client: Reaches the URL; a new O3Client by default.
            key_file: The Ed25519 key, created if it does not exist; by default one for all runs of this user. A run
                that continues on another machine needs the same key there, or that machine trusts this one's.
            trusted: Node ids whose commits count; by default this key's alone.
            node: Address of this machine's node ("127.0.0.1:7400"): parts come from its peers first, and are seeded
                after a save.
            cache_dir: Holds a checkpoint's parts while the node reads them; $TMPDIR by default. The node publishes
                nothing from a hidden folder.

        Raises:
            ValueError: The key file is damaged.
            InvalidParamsError: The key file cannot be read, or made.
        """
        self._store = url_or_store if isinstance(url_or_store, Store) else (client or O3Client()).at(url_or_store)
        path = Path(key_file).expanduser() if key_file else Path(user_data_dir("shoal", appauthor=False), KEY_FILENAME)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._key = SigningKey.load_or_create(path)
        except OSError as error:
            raise InvalidParamsError(
                f"the key file {path} cannot be read or made ({error.strerror}): give this user one of its own by "
                "key_file="
            ) from None
        self._trusted = frozenset(NodeId(one) for one in ([self._key.node_id] if trusted is None else trusted))
        self._node = node
        self._cache_dir = Path(cache_dir) if cache_dir else Path(tempfile.gettempdir())
        self._damaged: set[ContentId] = set()
        self._spare: dict[str, torch.Tensor] = {}
        """The last snapshot's tensors: the next one is made in their memory."""
        self._process = os.getpid()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._sending: Future[Commit] | None = None
        self._is_closed = False

    @property
    def node_id(self) -> NodeId:
        """Of the key that signs here: others put it into `trusted`."""
        return self._key.node_id

    def save_checkpoint(
        self,
        model: StateOf,
        optimizer: StateOf | None,
        epoch: int,
        *,
        run_id: str,
        step: int | None = None,
        scheduler: StateOf | None = None,
        loader: StateOf | None = None,
        extra: Any = None,
        rng: bool = True,
        wait: bool = False,
    ) -> None:
        """Save the given states; with `wait`, return when they are committed, else when they are copied.

        Waits for the save before it. Raises UnsayableStateError if only pickle could keep a state, the error of the
        save before, and with `wait` OriginError.
        """
        self._expect_usable()
        checked_run_id(run_id)
        checked_position(epoch, step)
        self.wait()
        given = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
        state = {name: _state_of(one) for name, one in given.items() if one is not None}
        state["extra"] = extra
        if rng:
            state["rng"] = rng_state()
        snapshot = take_snapshot(run_id, epoch, step, state, self._spare)
        self._spare = snapshot.state.tensors
        self._sending = self._sender.submit(self._send, snapshot)
        if wait:
            self.wait()

    def load_checkpoint(
        self,
        run_id: str,
        epoch: int | None = None,
        *,
        model: StateOf | None = None,
        optimizer: StateOf | None = None,
        scheduler: StateOf | None = None,
        loader: StateOf | None = None,
        restore_rng: bool = True,
    ) -> Checkpoint:
        """Load the newest complete checkpoint, or the newest one of `epoch`, into the given objects.

        No object is changed before all parts are here and checked; if one of them does not take its state, all of them
        are as they were. Raises CheckpointNotFoundError; for an `epoch` one of `restore.DAMAGE` if it is not complete;
        OriginError if the origin does not answer; InvalidParamsError if a state is asked for that was not saved;
        what the objects' own `load_state_dict` raises.
        """
        self._expect_usable()
        self.wait()
        found = self._read(checked_run_id(run_id), epoch)
        given = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
        wanted = {name: one for name, one in given.items() if one is not None}
        if lacking := sorted(wanted.keys() - found.state.keys()):
            raise InvalidParamsError(
                f"{found.key} holds {', '.join(sorted(found.state))}, and no {' and no '.join(lacking)}: load it"
                " without, or save it with the next checkpoint"
            )
        load_all(wanted, found.state)
        if restore_rng and "rng" in found.state:
            set_rng_state(found.state["rng"])
        return found

    def latest(self, run_id: str) -> Commit | None:
        """The newest valid commit whose parts all exist with their sizes; None if there is none."""
        self._expect_usable()
        for commit in commits(self._store, run_id, self._trusted):
            if not (why := missing_part(self._store, commit)):
                return commit
            log.warning("the checkpoint %s is not complete, an older one is looked for: %s", commit.key, why)
        return None

    def checkpoints(self, run_id: str) -> tuple[Commit, ...]:
        """All valid commits of a run, newest first. Whether their parts exist is not checked."""
        self._expect_usable()
        return tuple(commits(self._store, run_id, self._trusted))

    def wait(self) -> None:
        """Return when the save in progress is committed. Raises its error, once."""
        self._expect_process()
        sending, self._sending = self._sending, None
        if sending is not None:
            try:
                sending.result()
            except KeyboardInterrupt:
                self._sending = sending
                raise

    def close(self) -> None:
        """Wait for the save in progress, and end the thread. Raises the error of the save."""
        self._expect_process()
        self._is_closed = True
        try:
            self.wait()
        finally:
            self._sender.shutdown()
            self._spare = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, snapshot: Snapshot) -> Commit:
        """Runs on the sender's thread."""
        damaged = frozenset(self._damaged)
        parts = parts_of(snapshot)
        commit = upload(self._store, snapshot, parts, self._key, damaged)
        self._damaged -= damaged & {entry.content_id for entry in commit.manifest.manifest.shards}
        if self._node:
            self._seed(self._node, commit, parts)
        return commit

    def _seed(self, address: str, commit: Commit, parts: Mapping[str, Part]) -> None:
        """Give the parts to the node. The checkpoint is committed by then: an error here is a line in the log."""
        manifest = commit.manifest.manifest
        host, _, port = address.rpartition(":")
        try:
            with own_folder(self._cache_dir) as folder, SyncClient(host.strip("[]"), int(port)) as client:
                write_files(parts, folder)
                asked = {"path": str(folder.absolute()), "manifest": msgspec.to_builtins(manifest)}
                client.call("PUBLISH", asked, result_type=PublishResult, timeout_s=None)
        except (ShoalError, OSError) as err:
            log.warning("%s is at the origin, and is not seeded by the node %s: %s", manifest.name, address, err)

    def _read(self, run_id: str, epoch: int | None) -> Checkpoint:
        failed: list[tuple[str, str]] = []
        for commit in commits(self._store, run_id, self._trusted, epoch):
            try:
                state = read_state(self._store, commit, self._node, self._damaged)
            except DAMAGE as err:
                if epoch is not None:
                    raise
                log.warning("the checkpoint %s IS DAMAGED, an older one is taken: %s", commit.key, err)
                failed.append((commit.key, str(err)))
                continue
            extra = state.pop("extra", None)
            return Checkpoint(run_id, commit.epoch, commit.step, extra, state, commit.key, commit.digest, tuple(failed))
        which = "no checkpoint" if epoch is None else f"no checkpoint of epoch {epoch}"
        damaged = "".join(f"; {key} is damaged: {why}" for key, why in failed)
        raise CheckpointNotFoundError(
            f"the run {run_id!r} has {which} at {self._store.url} signed by {' or '.join(sorted(self._trusted))}"
            f"{damaged}"
        )

    def _expect_process(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError(
                "this O3CheckpointManager belongs to the process that this one was forked from; make one here"
            )

    def _expect_usable(self) -> None:
        self._expect_process()
        if self._is_closed:
            raise RuntimeError("this O3CheckpointManager is closed; make another one")


def _state_of(one: StateOf) -> Any:
    return one if isinstance(one, Mapping) else one.state_dict()
