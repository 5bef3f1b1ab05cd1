"""What all commands share: the envelope, the bases, and the one decoder of parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import inspect

from protocol.errors import InvalidParamsError
from protocol.ids import ContentId, ShardId
from protocol.manifest import FileName
from protocol.structs import prepared

RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
NameOrDigest = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
"""`name`, or `name@digest` with at least 8 digits of the manifest's digest, if a name alone is ambiguous; or the URL
of a manifest at an origin."""
Text = Annotated[str, msgspec.Meta(max_length=1 << 20)]


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of a command."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a command answers."""


class Envelope(msgspec.Struct, frozen=True, kw_only=True, rename={"sender": "from", "recipient": "to"}):
    """`params[1]` of a request."""

    request_id: RequestId | None = None
    """Names the request in its PROGRESS and TASK_OUTPUT notifications and for CANCEL; generated if missing."""
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

    Keys, and values that are declared as text, may come as bin, at any depth: some MessagePack libraries send all
    text so. Raises InvalidParamsError that names the offending field.
    """
    declared = _inspect(kind)
    try:
        return msgspec.convert(_with_text(text_keys(value), declared), prepared(kind))
    except msgspec.ValidationError as err:
        known = ", ".join(field.encode_name for field in declared.fields) or "none"
        raise InvalidParamsError(f"{err}; the parameters are: {known}") from None


def text_keys(value: object) -> dict[str, Any]:
    """A map of parameters with keys of bin decoded to text. Raises InvalidParamsError for any other value."""
    if not isinstance(value, Mapping):
        raise InvalidParamsError(f"params[0] must be a map of parameters, not {type(value).__name__}")
    return dict(_with_text_keys(value))


@functools.cache
def _inspect(kind: type[msgspec.Struct]) -> inspect.StructType:
    found = inspect.type_info(kind)
    assert isinstance(found, inspect.StructType)
    return found


def _with_text(value: Any, declared: inspect.Type) -> Any:
    """The value, with bin decoded to text in every key and in values that are declared as text."""
    if isinstance(declared, inspect.UnionType):
        # Of a union, the member that fits a map, an array or a text; no parameter has two of one sort.
        fits = _FITS.get(type(value), ())
        declared = next((member for member in declared.types if isinstance(member, fits)), inspect.AnyType())
    match value, declared:
        case bytes(), inspect.StrType() | inspect.LiteralType():
            return _text(value)
        case dict(), inspect.StructType(fields=fields):
            kinds = {field.encode_name: field.type for field in fields}
            return {key: _with_text(item, kinds.get(key, _ANY)) for key, item in _with_text_keys(value)}
        case dict(), inspect.DictType(value_type=item_type):
            return {key: _with_text(item, item_type) for key, item in _with_text_keys(value)}
        case list(), inspect.VarTupleType(item_type=item_type) | inspect.ListType(item_type=item_type):
            return [_with_text(item, item_type) for item in value]
        case _:
            return value


_ANY = inspect.AnyType()
_FITS: dict[type, tuple[type[inspect.Type], ...]] = {
    bytes: (inspect.BytesType, inspect.StrType, inspect.LiteralType),
    dict: (inspect.StructType, inspect.DictType),
    list: (inspect.VarTupleType, inspect.ListType),
}


def _with_text_keys(value: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        name = _text(key) if isinstance(key, bytes) else key
        if not isinstance(name, str):
            raise InvalidParamsError(f"a parameter's name must be a string, not {type(name).__name__}")
        yield name, item


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidParamsError("a text is not UTF-8") from None
