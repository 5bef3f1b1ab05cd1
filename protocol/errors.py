"""Every error that crosses the wire: one tree, each class with its `code`.

On the wire an error is the map `{code, message, retryable, details}`. A message says what was asked, what was
found, and what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class ShoalError(Exception):
    """Root of the tree. `details` holds plain MessagePack values for a program to read."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = dict(details or {})

    def to_wire(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "details": self.details,
        }


class InternalError(ShoalError):
    """Raised when something failed that no other class names; the node's log has the traceback."""


class MalformedMessageError(ShoalError):
    """Raised when bytes are not MessagePack or not MessagePack-RPC; the connection cannot go on."""

    code = "malformed_message"


class MessageTooLargeError(ShoalError):
    """Raised when a message, or a length that it announces, is above the receiver's bound."""

    code = "message_too_large"


class UnknownCommandError(ShoalError):
    """Raised when a method is not a command of this node."""

    code = "unknown_command"


class InvalidParamsError(ShoalError):
    """Raised when parameters have a wrong type, are missing, or contradict each other."""

    code = "invalid_params"


class WrongNodeError(ShoalError):
    """Raised when a request's `to` names another node."""

    code = "wrong_node"


class UnknownNameError(ShoalError):
    """Raised when no manifest of that model, data set or file is known here or in the DHT."""

    code = "name_not_found"


class AmbiguousNameError(ShoalError):
    """Raised when a name fits several manifests or files; `details.candidates` lists them."""

    code = "ambiguous_name"


class ShardNotFoundError(ShoalError):
    """Raised when a manifest has no such shard, or no file here answers to the description."""

    code = "shard_not_found"


class ShardNotLoadedError(ShoalError):
    """Raised when a task needs a shard that no node has loaded, and loading was not allowed."""

    code = "shard_not_loaded"


class NoSourceError(ShoalError):
    """Raised when no provider of a shard could be found, or none of them could be reached."""

    code = "no_source"
    retryable = True


class OriginError(ShoalError):
    """Raised when an origin does not give or take an object; `details` has `origin`, `key`, `status` and `tried`."""

    code = "origin_error"


class OriginNotFoundError(OriginError):
    """Raised when an origin has no such object, bucket or repository."""

    code = "origin_not_found"


class OriginExistsError(OriginError):
    """Raised when an object was to be written only if there is none, and there is one."""

    code = "origin_exists"


class OriginDeniedError(OriginError):
    """Raised when an origin refuses the credentials, or there are none, or a signature has expired."""

    code = "origin_denied"


class OriginUnavailableError(OriginError):
    """Raised when an origin cannot be reached, does not answer in time, or says that it is overloaded."""

    code = "origin_unavailable"
    retryable = True


class OriginCorruptError(OriginError):
    """Raised when what an origin gives is not what was asked for: other bytes, fewer, or another range."""

    code = "origin_corrupt"


class InvalidShardError(ShoalError):
    """Raised when a file's bytes or structure are not what they must be; it is never seeded or loaded."""

    code = "invalid_shard"


class InvalidManifestError(ShoalError):
    """Raised when a manifest is malformed, badly signed, or not the one that its digest names."""

    code = "invalid_manifest"


class InvalidRecordError(ShoalError):
    """Raised when a DHT record is malformed, forged, expired or too large."""

    code = "invalid_record"


class IllegalCutError(ShoalError):
    """Raised when a model cannot be cut before the layers that were asked for; `details.legal` names the legal cuts."""

    code = "illegal_cut"


class InsufficientDiskError(ShoalError):
    """Raised when a download would leave less free disk than the node keeps, or the disk is full."""

    code = "insufficient_disk"
    retryable = True


class InsufficientMemoryError(ShoalError):
    """Raised when loading a shard would need more memory than the machine has available."""

    code = "insufficient_memory"
    retryable = True


class ShardInUseError(ShoalError):
    """Raised when a shard cannot be evicted or unloaded because something still uses it."""

    code = "shard_in_use"
    retryable = True


class ContextOverflowError(ShoalError):
    """Raised when a prompt, or prompt and answer together, do not fit the context."""

    code = "context_overflow"


class StageLostError(ShoalError):
    """Raised when a stage of a pipeline died or its node went away in the middle of a session."""

    code = "stage_lost"
    retryable = True


class PeerLostError(ShoalError):
    """Raised when a transport peer stopped answering; what was in flight to it is not delivered."""

    code = "peer_lost"
    retryable = True


class TransportError(ShoalError):
    """Raised when activations cannot be sent: a bad ticket, a closed endpoint, a tensor that is not there."""

    code = "transport_error"


class EngineError(ShoalError):
    """Raised when llama.cpp refused a file, a batch or a context, or the engine's process died."""

    code = "engine_error"


class BusyError(ShoalError):
    """Raised when a bound on work in progress (sessions, downloads, requests) is reached."""

    code = "busy"
    retryable = True


class CancelledRequestError(ShoalError):
    """Raised when a request was ended by CANCEL, or by a shutdown of the node."""

    code = "cancelled"


class TimedOutError(ShoalError):
    """Raised when something did not happen within its time."""

    code = "timeout"
    retryable = True


class UnreachableError(ShoalError):
    """Raised when a node does not accept a connection, or the connection broke before the answer."""

    code = "unreachable"
    retryable = True


class UnsupportedPlatformError(ShoalError):
    """Raised when a native library has no build for this machine, or another layout than the one we call."""

    code = "unsupported_platform"


def _tree(root: type[ShoalError]) -> dict[str, type[ShoalError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def error_from_wire(value: object) -> ShoalError:
    """Turn the error slot of a MessagePack-RPC answer into an exception.

    Answers of other implementations may carry anything there; what is not our map becomes an InternalError
    whose message is its text, cut at 1,000 characters; so does a code unknown here, kept as `details.code`.
    """
    if not isinstance(value, Mapping):
        return InternalError(str(value)[:1000])
    details, code = value.get("details"), str(value.get("code"))[:100]
    details = dict(details) if isinstance(details, Mapping) else {}
    cls = _tree(ShoalError).get(code)
    if cls is None:
        cls, details = InternalError, details | {"code": code}
    return cls(str(value.get("message", ""))[:4000], details)
