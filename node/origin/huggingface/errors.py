"""huggingface_hub's exceptions, as the errors of origins."""

from __future__ import annotations

from typing import Any

from node.origin.core.errors import origin_error, status_error, unreachable_error
from node.origin.core.retry import retry_after_s
from protocol.errors import OriginDeniedError, OriginError, OriginNotFoundError

CREDENTIALS = "HF_TOKEN"
"""The variable that the token comes from, for messages."""
LIBRARY = "huggingface_hub"


def translated(error: Exception, did: str, *, origin: str, key: str, retried_by: str = "") -> OriginError:
    """The error for an exception of huggingface_hub, while it `did` something to `key`.

    `retried_by` names the library that repeated the request already, so that nothing above does it again.
    """
    ours = _translated(error, did, origin, key)
    if retried_by:
        ours.details["retried_by"] = retried_by
    return ours


def _translated(error: Exception, did: str, origin: str, key: str) -> OriginError:
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # its file system raises FileNotFoundError from what happened
    response: Any = getattr(error, "response", None)
    name = type(error).__name__
    if name in ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError"):
        # The hub answers 401 for a repository that does not exist, too.
        kind: type[OriginError] = OriginDeniedError if name == "GatedRepoError" else OriginNotFoundError
        found = f"the hub says {name.removesuffix('Error')}"
        advice = f"check its name and revision; a private or gated one needs {CREDENTIALS}"
        status = getattr(response, "status_code", None)
        return origin_error(kind, did, found, advice, origin=origin, key=key, status=status)
    if response is None and isinstance(error, FileNotFoundError):
        return status_error(404, "", did, origin=origin, key=key)
    if response is not None:
        after = retry_after_s(response.headers.get("Retry-After"))
        return status_error(
            response.status_code, "", did, origin=origin, key=key, retry_after_s=after, credentials=CREDENTIALS
        )
    if name in ("HFValidationError", "OfflineModeIsEnabled"):
        advice = "check the URL, and HF_HUB_OFFLINE"
        return origin_error(OriginError, did, f"{LIBRARY} says {name}", advice, origin=origin, key=key)
    return unreachable_error(did, f"no answer ({name})", origin=origin, key=key)
