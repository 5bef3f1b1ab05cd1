"""The commit object of a checkpoint: a signed JSON text that names its parts, written last, under a name of its own.

    commits/<run id>/<10 digits>-<16 digits>-<13 digits>-<digest>.json      epoch, step, milliseconds since 1970

In the order of names the last valid one is the latest. The digest is the SHA-256 of the signed text, and the text says
again what the name says, so that a commit that is copied to another name or run is not valid.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import msgspec

from protocol.errors import InvalidManifestError, InvalidParamsError
from protocol.ids import ContentId, NodeId
from protocol.manifest import SignedManifest, manifest_from_wire
from protocol.signing import SigningKey, is_signed_by
from protocol.structs import prepared
from torch_bridge.checkpoints.state import Json

COMMITS = "commits/"
MAX_COMMIT_BYTES = 64 * 1024 * 1024
"""Of a commit object at most: all of a state but its tensors is in it."""
_CONTEXT = b"shoal-checkpoint-v1\0"
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NAMED = re.compile(r"(\d{10})-(\d{16})-(\d{13})-([0-9a-f]{64})\.json")
_Digits64 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class InvalidCommitError(ValueError):
    """Raised when an object under a run's commits is not a trusted commit of that run; the message says why."""


class CommitKey(NamedTuple):
    """The parts of a commit object's name; sorted as names are, which is the order of checkpoints."""

    epoch: int
    step: int
    """0 if none was given."""
    written_ms: int
    """Since 1970, by the saver's clock, and above that of all commits of the run that it saw."""
    digest: str
    key: str


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    """The signed text."""

    run_id: str
    epoch: int
    step: int | None
    written_ms: int
    manifest_digest: _Digits64
    manifest: msgspec.Raw
    root_cids: dict[str, str]
    """Akave's, by content id, if the origin knew it when the commit was written."""
    structure: msgspec.Raw


class _Signed(msgspec.Struct, frozen=True, kw_only=True):
    """The object."""

    kind: Literal["shoal-checkpoint"] = "shoal-checkpoint"
    version: Literal[1] = 1
    publisher: _Digits64
    signature: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{128}\Z")]
    body: str


@dataclass(frozen=True, slots=True)
class Commit:
    """One checkpoint, as a valid commit describes it."""

    run_id: str
    epoch: int
    step: int | None
    written_ms: int
    """Milliseconds since 1970."""
    manifest: SignedManifest
    """The parts: safetensors files, by content id."""
    root_cids: dict[ContentId, str]
    """Akave's root CIDs of parts, if they were known."""
    structure: Json
    """The state without its tensors, as `state.flatten` writes it."""
    publisher: NodeId
    key: str = ""
    """The commit object's name at the origin."""
    digest: str = ""
    """SHA-256 of the signed text."""

    @property
    def total_bytes(self) -> int:
        """Of all parts."""
        return self.manifest.manifest.total_bytes


def checked_run_id(run_id: str) -> str:
    """Returns it. Raises InvalidParamsError for one that cannot be part of an object's name."""
    if not _RUN_ID.fullmatch(run_id):
        raise InvalidParamsError(
            f"{run_id!r} is not a run id: 1 to 100 letters, digits, '.', '_' and '-', the first a letter or digit"
        )
    return run_id


def checked_position(epoch: int, step: int | None) -> None:
    """Raises InvalidParamsError for numbers that do not fit the name of a commit."""
    if not 0 <= epoch < 10**10 or not 0 <= (step or 0) < 10**16:
        raise InvalidParamsError(f"epoch {epoch} and step {step}: both count from 0, with at most 10 and 16 digits")


def commit_folder(run_id: str) -> str:
    return f"{COMMITS}{checked_run_id(run_id)}/"


def parse_commit_key(key: str) -> CommitKey | None:
    """Read the name of a commit object; None for anything else."""
    found = _NAMED.fullmatch(key.rpartition("/")[2])
    return CommitKey(int(found[1]), int(found[2]), int(found[3]), found[4], key) if found else None


def encode_commit(commit: Commit, key: SigningKey, min_bytes: int) -> tuple[str, str, bytes]:
    """The commit object's name, its digest and its bytes: with spaces up to `min_bytes`, a store's least size.

    Raises InvalidParamsError if it is above MAX_COMMIT_BYTES.
    """
    body = msgspec.json.encode(
        _Body(
            run_id=commit.run_id,
            epoch=commit.epoch,
            step=commit.step,
            written_ms=commit.written_ms,
            manifest_digest=commit.manifest.digest,
            manifest=msgspec.Raw(msgspec.json.encode(commit.manifest)),
            root_cids={str(part): cid for part, cid in commit.root_cids.items()},
            structure=msgspec.Raw(json.dumps(commit.structure, allow_nan=False).encode()),
        )
    )
    signed = _Signed(publisher=key.node_id, signature=key.sign(_CONTEXT + body).hex(), body=body.decode())
    whole = msgspec.json.encode(signed).ljust(min_bytes)
    if len(whole) > MAX_COMMIT_BYTES:
        raise InvalidParamsError(
            f"the state without its tensors takes {len(whole)} bytes, a commit at most {MAX_COMMIT_BYTES}: keep long"
            " lists of numbers as tensors"
        )
    digest = hashlib.sha256(body).hexdigest()
    place = f"{commit.epoch:010d}-{commit.step or 0:016d}-{commit.written_ms:013d}"
    return f"{commit_folder(commit.run_id)}{place}-{digest}.json", digest, whole


def decode_commit(raw: bytes, named: CommitKey, run_id: str, trusted: frozenset[NodeId]) -> Commit:
    """Read and check the commit object of the name `named`. Raises InvalidCommitError."""
    try:
        signed = msgspec.json.decode(raw, type=prepared(_Signed))
        body = signed.body.encode()
    except (msgspec.DecodeError, RecursionError, UnicodeError) as err:
        raise InvalidCommitError(f"it is not a commit, or half of one: {err}") from None
    publisher = NodeId(signed.publisher)
    if publisher not in trusted:
        raise InvalidCommitError(f"it is signed by {publisher}, whose commits are not trusted here")
    if not is_signed_by(publisher, _CONTEXT + body, bytes.fromhex(signed.signature)):
        raise InvalidCommitError(f"its signature is not that of {publisher}")
    if hashlib.sha256(body).hexdigest() != named.digest:
        raise InvalidCommitError("its digest is not the one in its name")
    try:
        said = msgspec.json.decode(body, type=prepared(_Body))
        manifest = manifest_from_wire(msgspec.json.decode(said.manifest))
        # Python's own reader: a structure holds integers of any size.
        structure = json.loads(bytes(said.structure))
    except (msgspec.DecodeError, ValueError, RecursionError, InvalidManifestError) as err:
        raise InvalidCommitError(f"what is signed cannot be read: {err}") from None
    if (said.run_id, said.epoch, said.step or 0, said.written_ms) != (run_id, *named[:3]):
        raise InvalidCommitError(f"it is of run {said.run_id!r}, epoch {said.epoch}, which its name does not say")
    if manifest.digest != said.manifest_digest:
        raise InvalidCommitError(f"its manifest is {manifest.digest}, it names {said.manifest_digest}")
    return Commit(
        run_id=run_id,
        epoch=said.epoch,
        step=said.step,
        written_ms=said.written_ms,
        manifest=manifest,
        root_cids={ContentId(content_id): cid for content_id, cid in said.root_cids.items()},
        structure=structure,
        publisher=publisher,
        key=named.key,
        digest=named.digest,
    )
