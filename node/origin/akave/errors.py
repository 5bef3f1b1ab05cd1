"""The akavesdk's exceptions, as the errors of origins.

The SDK has one class, SDKError, for everything. The gRPC status below it says more; without one its words must do.
"""

from __future__ import annotations

import re

from node.origin.core.errors import origin_error
from protocol.errors import (
    OriginCorruptError,
    OriginDeniedError,
    OriginError,
    OriginExistsError,
    OriginNotFoundError,
    OriginUnavailableError,
)

_STATUS: dict[str, type[OriginError]] = {
    "NOT_FOUND": OriginNotFoundError,
    "ALREADY_EXISTS": OriginExistsError,
    "PERMISSION_DENIED": OriginDeniedError,
    "UNAUTHENTICATED": OriginDeniedError,
    "UNAVAILABLE": OriginUnavailableError,
    "DEADLINE_EXCEEDED": OriginUnavailableError,
    "RESOURCE_EXHAUSTED": OriginUnavailableError,
    "ABORTED": OriginUnavailableError,
    "CANCELLED": OriginUnavailableError,
}

_NONCE = ("nonce too low", "replacement transaction underpriced", "already known")

_WORDS: tuple[tuple[type[OriginError], tuple[str, ...]], ...] = (
    (OriginUnavailableError, _NONCE),
    (OriginExistsError, ("already exists", "alreadyexists", "file exists", "bucket exists", "0x6891dde0")),
    (
        OriginUnavailableError,
        (
            "failed to connect",
            "unavailable",
            "timed out",
            "timeout",
            "deadline",
            "connection",
            "dns resolution",
            "failed to dial",
            "could not fetch contract information",
            "eof",
            "closed channel",
        ),
    ),
    (
        OriginDeniedError,
        ("unauthorized", "not authorized", "not the owner", "permission", "private key", "insufficient funds"),
    ),
    (OriginNotFoundError, ("not found", "doesn't exist", "does not exist", "nonexist")),
)
"""The first match counts. The hexadecimal number is the contract's selector of FileAlreadyExists."""

_ADVICE: dict[type[OriginError], str] = {
    OriginCorruptError: "ask again, or another origin",
    OriginNotFoundError: "check bucket, name and AKAVE_PRIVATE_KEY",
    OriginExistsError: "use a new name: names on Akave are written once",
    OriginDeniedError: "check AKAVE_PRIVATE_KEY, and that its account has funds on Akave's chain",
    OriginUnavailableError: "try again later, and check the node's address (--akave-node, --akave-ipc)",
}


class UnexpectedAnswerError(Exception):
    """Raised when the node offers something else than what was asked for."""


class LostTransactionError(Exception):
    """Raised when a transaction lost against another one of the account, and may be sent again."""


def is_nonce_race(error: BaseException) -> bool:
    """Whether a transaction lost against another one of the same account, and may be sent again."""
    words = str(error).lower()
    return any(word in words for word in _NONCE)


def translate(error: BaseException, did: str, *, origin: str, key: str, secret: str) -> OriginError:
    """The error for an exception of the SDK, while it `did` something to `key`.

    `details["lost_transaction"]`: the same call may be sent again. Raise the error `from None`: the SDK's exception
    may lead to its configuration, which has the private key.
    """
    status = _grpc_status(error)
    lost = isinstance(error, LostTransactionError)
    if isinstance(error, UnexpectedAnswerError):
        kind: type[OriginError] = OriginCorruptError
    else:
        kind = _STATUS.get(status) or _kind_by_words(str(error))
    words = without_secret(" ".join(str(error).split()), secret)[:400] or type(error).__name__
    found = f"the akavesdk says {words!r}" + (f" (gRPC {status})" if status else "")
    ours = origin_error(kind, did, found, _ADVICE.get(kind, "see docs/akave.md"), origin=origin, key=key)
    ours.details["status"] = status
    if lost:
        ours.details["lost_transaction"] = True
    return ours


def without_secret(text: str, secret: str) -> str:
    """The text with *** in place of the key, in any spelling."""
    bare = secret.lower().removeprefix("0x")
    return re.sub(f"(0x)?{re.escape(bare)}", "***", text, flags=re.IGNORECASE) if bare else text


def _kind_by_words(text: str) -> type[OriginError]:
    text = text.lower()
    for kind, words in _WORDS:
        if any(word in text for word in words):
            return kind
    return OriginError


def _grpc_status(error: BaseException) -> str:
    """The status of the gRPC call that failed below, or "". The SDK keeps it only as the context of its exception."""
    seen: set[int] = set()
    below: BaseException | None = error
    while below is not None and id(below) not in seen:
        seen.add(id(below))
        code = getattr(below, "code", None)
        name = getattr(code(), "name", "") if callable(code) else ""
        if isinstance(name, str) and name not in ("", "OK", "UNKNOWN", "INTERNAL"):
            return name
        below = below.__cause__ or below.__context__
    return ""
