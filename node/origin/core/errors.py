"""Makes the errors of origins: each names origin, key, status and tries, and none contains a credential."""

from __future__ import annotations

import re

from node.origin.interface import MAX_LISTED
from protocol.errors import (
    OriginCorruptError,
    OriginDeniedError,
    OriginError,
    OriginExistsError,
    OriginNotFoundError,
    OriginUnavailableError,
)

_DENIED_CODES = {
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
"""S3 answers some of them with 400."""
_REGION_CODES = (
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "IncorrectEndpoint",
    "PermanentRedirect",
    "TemporaryRedirect",
)
"""A request is signed for a region, and S3 answers these if the bucket is in another."""
_ARCHIVED_CODES = ("InvalidObjectState", "ObjectNotInActiveTierError")
_RETRY_CODES = {"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "TooManyRequests"}
_CODE = re.compile(r"[A-Za-z]{3,40}")


def origin_error(
    kind: type[OriginError],
    did: str,
    found: str,
    advice: str,
    *,
    origin: str,
    key: str,
    status: int | None = None,
    retry_after_s: float | None = None,
) -> OriginError:
    """An error that says what was asked of which origin, what was found and what to do.

    `did` is what was asked, to be followed by the key: "read bytes 0 to 5 of". `details["tried"]` is 1: `with_tries`
    changes it.
    """
    what = f"{did} {key!r}" if key else did
    details: dict[str, object] = {
        "origin": origin,
        "key": key,
        "status": "" if status is None else str(status),
        "tried": 1,
    }
    if retry_after_s is not None:
        details["retry_after_s"] = retry_after_s
    return kind(f"{origin}: {what}: {found}; {advice}", details)


def status_error(
    status: int,
    code: str,
    did: str,
    *,
    origin: str,
    key: str,
    retry_after_s: float | None = None,
    credentials: str = "",
) -> OriginError:
    """The error for an HTTP status that is not a success.

    `code` is S3's error code, or empty; `credentials` names the variables that the credentials come from.
    """
    code = code if _CODE.fullmatch(code) else ""
    found = f"the answer was {status}" + (f" {code}" if code else "")
    kind, advice = _meaning(status, code, credentials)
    return origin_error(kind, did, found, advice, origin=origin, key=key, status=status, retry_after_s=retry_after_s)


def _meaning(status: int, code: str, credentials: str) -> tuple[type[OriginError], str]:
    if code in _REGION_CODES or (status in (301, 307) and not code):
        return OriginError, "the bucket is in another region: set AWS_REGION, or the endpoint of its region"
    if code in _ARCHIVED_CODES:
        return OriginError, "the object is archived (Glacier): restore a readable copy of it first, then ask again"
    if status in (401, 403, 407) or code in _DENIED_CODES:
        return OriginDeniedError, _access_advice(code, credentials)
    if status in (404, 410):
        return OriginNotFoundError, (
            "check the bucket's name" if code == "NoSuchBucket" else "check the URL, or publish it there first"
        )
    if status in (408, 425, 429) or code in _RETRY_CODES or (status >= 500 and status != 501):
        return OriginUnavailableError, "it is overloaded or out of order: try again later, or name another origin"
    if status in (409, 412):
        return OriginExistsError, "there is another object of that name, or it changed in the meantime"
    if status == 416:
        return OriginCorruptError, "the object there is smaller than it should be: publish it again"
    return OriginError, "the origin cannot do this"


def _access_advice(code: str, credentials: str) -> str:
    if code == "RequestTimeTooSkewed":
        return "set this machine's clock"
    if code in ("ExpiredToken", "TokenRefreshRequired"):
        return f"get new credentials ({credentials})" if credentials else "get new credentials"
    return f"check the credentials ({credentials}) and what they may do" if credentials else "it is not public"


def listing_too_long_error(prefix: str, *, origin: str) -> OriginError:
    """The error for a listing that finds more than MAX_LISTED objects."""
    found, advice = (
        f"it has more than {MAX_LISTED} objects there",
        "name one object, or keep fewer objects under one prefix",
    )
    return origin_error(OriginError, "list", found, advice, origin=origin, key=prefix)


def unreachable_error(did: str, found: str, *, origin: str, key: str) -> OriginError:
    """The error for no answer: no connection, a broken one, or silence until the time-out."""
    advice = "check the network and the endpoint, or name another origin"
    return origin_error(OriginUnavailableError, did, found, advice, origin=origin, key=key)


def corrupt_error(did: str, found: str, *, origin: str, key: str, broke_off: bool = False) -> OriginError:
    """The error for bytes that are not those that were asked for.

    `broke_off` (also in `details`): the answer ended early; its bytes are good, and another try may bring the rest.
    """
    error = origin_error(OriginCorruptError, did, found, "ask again, or another origin", origin=origin, key=key)
    if broke_off:
        error.details["broke_off"] = True
    return error


def with_tries(error: OriginError, tries: int, seconds: float) -> OriginError:
    """The same error, which now says how often the request was sent."""
    error.details["tried"] = tries
    if tries > 1:
        error.message = f"{error.message} (tried {tries} times in {seconds:.1f} s)"
        error.args = (error.message,)
    return error
