"""obstore's and botocore's exceptions, as the errors of origins.

Of their texts only a status, S3's code and a few known words are used: the rest may contain signed headers and URLs.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from node.origin.core.errors import corrupt_error, origin_error, status_error, unreachable_error
from node.origin.core.retry import retry_after_s
from protocol.errors import OriginDeniedError, OriginError, OriginExistsError, OriginNotFoundError

_STATUS = re.compile(r"status(?: code)?: (\d{3})\b")
_CODE = re.compile(r"<Code>([A-Za-z]{3,40})</Code>")
_NO_ANSWER = (
    ("ConnectionRefused", "the connection was refused"),
    ("dns error", "its name is not known"),
    ("certificate", "its certificate is not trusted"),
    ("TimedOut", "nothing came in time"),
    ("kind: Timeout", "nothing came in time"),
    ("kind: Connect", "no connection"),
    ("IncompleteMessage", "it closed the connection without an answer"),
    ("ConnectionReset", "it closed the connection"),
    ("HttpError", "the connection broke"),
)
_WRONG_RANGE = (
    ("NotPartial", "it ignores Range and answered with the whole object"),
    ("UnexpectedRange", "it answered with another range"),
    ("NoContentRange", "it did not say which range its answer is"),
)
_BOTOCORE_NETWORK = ("HTTPClientError", "ConnectionError", "IncompleteReadError")
_NO_ANSWER_BOTOCORE = (
    ("Connection refused", "the connection was refused"),
    ("Name or service not known", "its name is not known"),
    ("failure in name resolution", "its name is not known"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not trusted"),
    ("TimeoutError", "nothing came in time"),  # ConnectTimeoutError, ReadTimeoutError
)
_BROKEN_BODY_BOTOCORE = ("IncompleteReadError", "ResponseStreamingError", "IncompleteRead", "ProtocolError")
_BROKEN_BODY = ("IncompleteBody", "UnexpectedEof")


class S3ErrorTranslator(NamedTuple):
    """Translates the exceptions of one origin."""

    origin: str
    credentials: str
    """The variables that its credentials come from, for messages; empty if requests are not signed."""

    def of_obstore(self, error: Exception, did: str, key: str) -> OriginError:
        """The error for an exception of obstore, while it `did` something to `key`."""
        text = str(error)
        status, code = _STATUS.search(text), _CODE.search(text)
        if status is not None:
            return self.of_answer(int(status[1]), code[1] if code else "", did, key)
        for word, found in _WRONG_RANGE:
            if word in text:
                return corrupt_error(did, found, origin=self.origin, key=key)
        if any(word in text for word in _BROKEN_BODY):
            return corrupt_error(did, "its answer broke off", origin=self.origin, key=key, broke_off=True)
        for word, found in _NO_ANSWER:
            if word in text:
                return unreachable_error(did, found, origin=self.origin, key=key)
        kind, name = _by_class(error)
        return origin_error(kind, did, name, "check the URL and the endpoint", origin=self.origin, key=key)

    def of_botocore(self, error: Exception, did: str, key: str) -> OriginError:
        """The error for an exception of botocore."""
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            meta = response.get("ResponseMetadata", {})
            asked = retry_after_s(meta.get("HTTPHeaders", {}).get("retry-after"))
            code = str(response.get("Error", {}).get("Code", ""))
            return self.of_answer(int(meta.get("HTTPStatusCode", 0)), code, did, key, asked)
        # The names of its network errors say what happened: ProxyConnectionError, ConnectionClosedError, ...
        found = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
        words = f"{type(error).__name__} {getattr(error, 'kwargs', {}).get('error', '')}"
        found = next((said for word, said in _NO_ANSWER_BOTOCORE if word in words), found)
        if any(kind.__name__ in _BOTOCORE_NETWORK for kind in type(error).__mro__):
            return unreachable_error(did, found, origin=self.origin, key=key)
        advice = "check the URL, the endpoint and the credentials"
        return origin_error(OriginError, did, f"botocore says {found}", advice, origin=self.origin, key=key)

    def of_broken_body(self, error: Exception, did: str, key: str) -> OriginError:
        """The error for an exception of botocore while it read an answer's body."""
        if type(error).__name__ in _BROKEN_BODY_BOTOCORE:
            return corrupt_error(did, "its answer broke off", origin=self.origin, key=key, broke_off=True)
        return self.of_botocore(error, did, key)

    def of_answer(self, status: int, code: str, did: str, key: str, asked_s: float | None = None) -> OriginError:
        """The error for a status that is not a success."""
        return status_error(
            status,
            code,
            did,
            origin=self.origin,
            key=key,
            retry_after_s=asked_s,
            credentials=self.credentials,
        )


def _by_class(error: Exception) -> tuple[type[OriginError], str]:
    match type(error).__name__:
        case "FileNotFoundError" | "NotFoundError":
            return OriginNotFoundError, "it is not there"
        case "AlreadyExistsError" | "PreconditionError":
            return OriginExistsError, "there is an object of that name"
        case "PermissionDeniedError" | "UnauthenticatedError":
            return OriginDeniedError, "it was refused"
        case name:
            return OriginError, f"obstore says {name}"
