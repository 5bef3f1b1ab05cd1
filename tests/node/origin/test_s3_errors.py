"""S3's errors: which of them say that nobody answered, and what they advise."""

from __future__ import annotations

import botocore.exceptions as botocore
import pytest

from node.origin.s3.errors import S3ErrorTranslator
from protocol.errors import OriginDeniedError, OriginError, OriginUnavailableError

FAILURES = S3ErrorTranslator("s3://bucket", "the environment")


@pytest.mark.parametrize(
    "error",
    [
        botocore.EndpointConnectionError(endpoint_url="https://secret.example.org"),
        botocore.ReadTimeoutError(endpoint_url="https://secret.example.org"),
        botocore.ConnectionClosedError(endpoint_url="https://secret.example.org"),
        botocore.SSLError(endpoint_url="https://secret.example.org", error="x"),
    ],
)
def test_no_answer_may_come_later(error: Exception) -> None:
    mine = FAILURES.of_botocore(error, "write", "a")
    assert type(mine) is OriginUnavailableError
    assert "secret" not in mine.message


@pytest.mark.parametrize(
    "error",
    [botocore.ParamValidationError(report="secret"), botocore.NoCredentialsError(), ValueError("secret")],
)
def test_what_trying_again_does_not_mend_is_another_error(error: Exception) -> None:
    mine = FAILURES.of_botocore(error, "write", "a")
    assert type(mine) is OriginError
    assert "secret" not in mine.message


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (400, "AuthorizationHeaderMalformed", "in another region: set AWS_REGION"),
        (400, "IllegalLocationConstraintException", "in another region: set AWS_REGION"),
        (301, "PermanentRedirect", "in another region: set AWS_REGION"),
        (301, "", "in another region: set AWS_REGION"),
        (403, "InvalidObjectState", "archived (Glacier): restore"),
    ],
)
def test_a_wrong_region_and_an_archived_object_are_not_called_credentials(status: int, code: str, advice: str) -> None:
    mine = FAILURES.of_answer(status, code, "read", "a")
    assert type(mine) is OriginError
    assert advice in mine.message
    assert "credentials" not in mine.message
    assert type(FAILURES.of_answer(403, "AccessDenied", "read", "a")) is OriginDeniedError
