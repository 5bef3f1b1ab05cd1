"""What all commands share: the envelope, the bases, and the one decoder of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from protocol.errors import InvalidParamsError
from protocol.ids import ContentId, ShardId
from protocol.manifest import FileName

RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
NameOrDigest = Annotated[str, msgspec.Meta(min_length=1, max_length=280)]
"""`name`, or `name@digest` with at least 8 digits of the manifest's digest, where a name alone is ambiguous."""
Text = Annotated[str, msgspec.Meta(max_length=1 << 20)]


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of a command."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a command answers."""


class Envelope(msgspec.Struct, frozen=True, kw_only=True, rename={"sender": "from", "recipient": "to"}):
    """`params[1]` of a request."""

    request_id: RequestId | None = None
    """Names the request in its PROGRESS and TASK_OUTPUT notifications and for CANCEL; made up where missing."""
    sender: str | None = None
    recipient: str | None = None
    """Node id that the request is meant for; another node refuses it."""


class ShardSelector(Params, frozen=True, kw_only=True):
    """Which shard: `{model|dataset, shard_id}`, or `{content_id}`, or `{filename}`."""

    model: NameOrDigest | None = None
    dataset: NameOrDigest | None = None
    shard_id: ShardId | None = None
    content_id: ContentId | None = None
    filename: FileName | None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message of a chat."""

    role: Annotated[str, msgspec.Meta(max_length=64)]
    content: Text


class Empty(Result, frozen=True, kw_only=True):
    """A result with nothing to say."""


P = TypeVar("P", bound=msgspec.Struct)


def decode_params(kind: type[P], value: object) -> P:
    """Check a map of parameters against its declaration.

    Keys, and values where text is declared, may come as bin: MessagePack before 2013 had no string type, and
    clients of that age are still about. Raises InvalidParamsError that names the offending field.
    """
    if not isinstance(value, Mapping):
        raise InvalidParamsError(f"params[0] must be a map of parameters, not {type(value).__name__}")
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    found: dict[str, Any] = {}
    for raw_key, item in value.items():
        key = _text(raw_key) if isinstance(raw_key, bytes) else raw_key
        if not isinstance(key, str):
            raise InvalidParamsError(f"a parameter's name must be a string, not {type(key).__name__}")
        if isinstance(item, bytes) and key in fields and "bytes" not in repr(fields[key]):
            item = _text(item)
        found[key] = item
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as err:
        known = ", ".join(fields) or "none"
        raise InvalidParamsError(f"{err}; the parameters are: {known}") from None


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidParamsError("a text is not UTF-8") from None
