"""Secrets are read from where they should be, and shown nowhere."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path

import pytest

from node.origin.core.credentials import Credentials, Secret, read_secret
from node.origin.core.errors import origin_error, status_error, with_tries
from node.origin.core.retry import RetryLoop, retry_after_s
from node.origin.s3.access import S3Access
from node.origin.s3.errors import S3ErrorTranslator
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import (
    InvalidParamsError,
    OriginCorruptError,
    OriginDeniedError,
    OriginError,
    OriginUnavailableError,
)
from tests.support.clocks import LeapingClock

VALUE = "wJalrXUtnFEMI"


def test_a_secret_prints_as_stars_in_every_way() -> None:
    secret = Secret(VALUE)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r:>20}", "%s" % secret, f"{[secret]}"]  # noqa: UP031
    settings = OriginSettings(credentials=Credentials(o3_secret_key=secret, hf_token=secret))
    shown += [repr(settings), str(dataclasses.asdict(settings)), repr(pickle.dumps(settings))]
    assert all(VALUE not in text for text in shown)
    assert secret.reveal() == VALUE
    assert copy.deepcopy(secret).reveal() == VALUE
    assert (secret == Secret(VALUE), secret == Secret("other"), bool(Secret(""))) == (True, False, False)


def test_a_secret_out_of_a_pickle_says_why_it_is_none() -> None:
    copied = pickle.loads(pickle.dumps(Secret(VALUE)))
    with pytest.raises(OriginDeniedError, match="pickle"):
        copied.reveal()


def test_secrets_come_from_the_environment_or_files(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{VALUE}\n")
    env = {"AKAVE_O3_ACCESS_KEY": " access ", "AKAVE_O3_SECRET_KEY_FILE": str(tmp_path / "key"), "HF_TOKEN": ""}
    found = Credentials.from_environment(env)
    assert found == Credentials(o3_access_key=Secret("access"), o3_secret_key=Secret(VALUE))


def test_a_file_that_holds_no_secret_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "large").write_bytes(b"x" * 100_000)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("empty", "large", "binary", "missing"):
        with pytest.raises(InvalidParamsError, match=f"AKAVE_PRIVATE_KEY_FILE names .*{name}"):
            read_secret({"AKAVE_PRIVATE_KEY_FILE": str(tmp_path / name)}, "AKAVE_PRIVATE_KEY")
    with pytest.raises(InvalidParamsError, match="both") as caught:
        read_secret({"HF_TOKEN": VALUE, "HF_TOKEN_FILE": "/x"}, "HF_TOKEN")
    assert VALUE not in caught.value.message


def test_settings_from_the_environment() -> None:
    env = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_REGION": "eu-central-1", "AWS_ACCESS_KEY_ID": "a"}
    settings = OriginSettings.from_environment(env, o3_endpoint=None, s3_region=None, origins=("o3://b",))
    assert (settings.s3_endpoint, settings.s3_region) == ("http://127.0.0.1:9", "eu-central-1")
    assert settings.o3_endpoint == OriginSettings().o3_endpoint
    assert settings.origins == ("o3://b",)
    assert OriginSettings.from_environment({}, retry_total_s=0.0).retry_total_s == 0.0
    for wrong in ({"o3_backend": "other"}, {"o3_endpoint": "o3.example.org"}, {"timeout_s": 0}, {"nonsense": 1}):
        with pytest.raises(InvalidParamsError):
            OriginSettings.from_environment({}, **wrong)


def test_half_a_key_is_refused() -> None:
    settings = OriginSettings(credentials=Credentials(o3_access_key=Secret(VALUE)))
    with pytest.raises(InvalidParamsError, match="AKAVE_O3_SECRET_KEY") as caught:
        S3Access.of(OriginUrl.parse("o3://bucket"), settings)
    assert VALUE not in caught.value.message
    assert not S3Access.of(OriginUrl.parse("s3://bucket"), settings).signs


OBSTORE_TEXT = f"""Generic S3 error: Error performing GET http://o3/b/k?X-Amz-Signature={VALUE}&X-Amz-Credential={VALUE}
in 3ms - Server returned non-2xx status code: 403 Forbidden: <Error><Code>SignatureDoesNotMatch</Code>
<AWSAccessKeyId>{VALUE}</AWSAccessKeyId><SignatureProvided>{VALUE}</SignatureProvided></Error>"""


def test_of_a_foreign_error_only_the_status_and_the_code_go_on() -> None:
    error = S3ErrorTranslator("o3://b", "SOME_KEY").of_obstore(RuntimeError(OBSTORE_TEXT), "read", "k")
    assert isinstance(error, OriginDeniedError)
    assert error.details == {"origin": "o3://b", "key": "k", "status": "403", "tried": 1}
    assert "403 SignatureDoesNotMatch" in error.message
    assert VALUE not in repr(error)
    unknown = S3ErrorTranslator("o3://b", "").of_obstore(RuntimeError(f"what is {VALUE}"), "read", "k")
    assert VALUE not in repr(unknown)
    coded = status_error(400, f"{VALUE} <b>", "read", origin="o3://b", key="k")
    assert VALUE not in repr(coded)


def unavailable(**details: object) -> OriginError:
    error = origin_error(OriginUnavailableError, "read", "503", "wait", origin="o3://b", key="k", status=503)
    error.details |= details
    return error


async def tries_of(error: OriginError, total_s: float = 15.0) -> int:
    tries, clock = 0, LeapingClock()

    async def call() -> None:
        nonlocal tries
        tries += 1
        raise error

    with pytest.raises(OriginError):
        await RetryLoop(total_s, tries=4, clock=clock).run(call)
    waits = [(0.1 * 2**number, 0.2 * 2**number) for number in range(len(clock.slept_s))]
    assert all(least <= wait <= most for wait, (least, most) in zip(clock.slept_s, waits, strict=True))
    return tries


async def test_only_what_may_pass_is_tried_again() -> None:
    assert await tries_of(unavailable()) == 4
    assert await tries_of(unavailable(), total_s=0.0) == 1
    assert await tries_of(unavailable(retry_after_s=100.0)) == 1, "no try later than the total"
    assert await tries_of(OriginDeniedError("no")) == 1
    assert await tries_of(OriginCorruptError("wrong")) == 1
    assert await tries_of(OriginCorruptError("short", {"broke_off": True})) == 3
    assert await tries_of(unavailable(retried_by="a library")) == 1, "a loop below has repeated it already"


def test_an_error_says_how_often_it_was_tried() -> None:
    error = with_tries(unavailable(), 3, 1.26)
    assert "tried 3 times in 1.3 s" in str(error)
    assert error.details["tried"] == 3
    assert error.to_wire()["message"] == str(error)


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, None), ("7", 7.0), (" 12 ", 12.0), ("soon", None), ("-3", None), ("9" * 30, None)]
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after_s(header) == seconds


def test_retry_after_as_a_date() -> None:
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    later = retry_after_s("Wed, 21 Oct 2099 07:28:00 GMT")
    assert later is not None
    assert later > 1e9
