"""Secrets, read from the environment or from files, shown nowhere."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from protocol.errors import InvalidParamsError, OriginDeniedError

SHOWN = "***"
MAX_FILE_BYTES = 65_536
VARIABLES = {
    "o3_access_key": "AKAVE_O3_ACCESS_KEY",
    "o3_secret_key": "AKAVE_O3_SECRET_KEY",
    "akave_private_key": "AKAVE_PRIVATE_KEY",
    "s3_access_key": "AWS_ACCESS_KEY_ID",
    "s3_secret_key": "AWS_SECRET_ACCESS_KEY",
    "s3_session_token": "AWS_SESSION_TOKEN",
    "hf_token": "HF_TOKEN",
}
"""The variable of each credential; the same name with _FILE at its end names a file that has it."""


class Secret:
    """A string that prints as ***, however it is printed. Its pickle does not contain it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value: str | None = value

    def reveal(self) -> str:
        """The string. Raises OriginDeniedError if this object came out of a pickle, which carries no secret."""
        if self._value is None:
            raise OriginDeniedError(
                "credentials do not travel in pickles; read them again in this process, from the environment or files"
            )
        return self._value

    @property
    def withheld(self) -> bool:
        """Whether this object came out of a pickle, and had a secret before."""
        return self._value is None

    def __repr__(self) -> str:
        return SHOWN

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(SHOWN, spec)

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        if self._value is None or other._value is None:
            return self._value is other._value
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(self._value)

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return (_withheld, ())


def _withheld() -> Secret:
    secret = Secret("")
    secret._value = None
    return secret


@dataclass(frozen=True)
class Credentials:
    """The credentials for all kinds of origins; None for those that the environment does not have."""

    o3_access_key: Secret | None = None
    o3_secret_key: Secret | None = None
    akave_private_key: Secret | None = None
    s3_access_key: Secret | None = None
    s3_secret_key: Secret | None = None
    s3_session_token: Secret | None = None
    hf_token: Secret | None = None

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Credentials:
        """Read each variable, or the file that the variable with `_FILE` at its end names.

        Raises InvalidParamsError if both are set, or if a file cannot be read.
        """
        return cls(**{field: read_secret(env, name) for field, name in VARIABLES.items()})

    def withheld(self) -> tuple[str, ...]:
        """The names of the variables whose secrets did not travel in a pickle."""
        return tuple(
            name for field, name in VARIABLES.items() if (one := getattr(self, field)) is not None and one.withheld
        )

    def read_again(self, env: Mapping[str, str]) -> Credentials:
        """The same, with the secrets that did not travel in a pickle, if `env` has them. Raises InvalidParamsError."""
        found = {field: read_secret(env, name) for field, name in VARIABLES.items() if name in self.withheld()}
        return replace(self, **{field: secret for field, secret in found.items() if secret})


def read_secret(env: Mapping[str, str], name: str) -> Secret | None:
    """The secret from the variable `name` or from the file that `name`_FILE names; None if neither is set.

    An empty variable counts as not set: compose files make such. Raises InvalidParamsError.
    """
    value, path = env.get(name, "").strip(), env.get(f"{name}_FILE", "").strip()
    if value and path:
        raise InvalidParamsError(f"{name} and {name}_FILE are both set; set one of them")
    if path:
        value = _read(name, Path(path))
    return Secret(value) if value else None


def _read(name: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        value = raw.decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidParamsError(f"{name}_FILE names {path}, which cannot be read: {reason}") from None
    if not value or len(raw) > MAX_FILE_BYTES:
        what = "empty" if not value else f"larger than {MAX_FILE_BYTES} bytes"
        raise InvalidParamsError(f"{name}_FILE names {path}, which is {what}; it must hold the secret and nothing else")
    return value
