"""How an S3 bucket is reached: endpoint, region, keys and time-outs; and obstore's client for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from node.origin.core.credentials import Secret
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import InvalidParamsError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Credential
    from obstore.store import S3Store as Client

_REFUSED_BY_O3 = ("AWS_CHECKSUM_ALGORITHM", "AWS_SERVER_SIDE_ENCRYPTION")
"""obstore reads these from the environment, whatever arguments it gets."""


class _StaticCredentials:
    """Gives obstore the keys when it signs; as arguments they would be shown in the store's `config`."""

    def __init__(self, access_key: Secret, secret_key: Secret, token: Secret | None) -> None:
        self._access_key, self._secret_key, self._token = access_key, secret_key, token

    def __call__(self) -> S3Credential:
        return {
            "access_key_id": self._access_key.reveal(),
            "secret_access_key": self._secret_key.reveal(),
            "token": self._token.reveal() if self._token else None,
            "expires_at": None,
        }


@dataclass(frozen=True)
class S3Access:
    """One bucket, and the keys for it."""

    bucket: str
    endpoint: str
    region: str
    access_key: Secret | None
    secret_key: Secret | None
    session_token: Secret | None
    credentials_from: str
    """The names of their variables, for messages."""
    connect_timeout_s: float
    read_timeout_s: float
    timeout_s: float
    refused_environment: tuple[str, ...] = ()

    @classmethod
    def of(cls, url: OriginUrl, settings: OriginSettings) -> S3Access:
        """The settings for an o3:// or s3:// URL. Raises InvalidParamsError if only one half of a key pair is set."""
        credentials = settings.credentials
        times = (settings.connect_timeout_s, settings.read_timeout_s, settings.timeout_s)
        if url.scheme == "o3":
            keys: tuple[Secret | None, Secret | None, Secret | None] = (
                credentials.o3_access_key,
                credentials.o3_secret_key,
                None,
            )
            names = "AKAVE_O3_ACCESS_KEY and AKAVE_O3_SECRET_KEY"
            endpoint, region = settings.o3_endpoint, settings.o3_region
        else:
            keys = (credentials.s3_access_key, credentials.s3_secret_key, credentials.s3_session_token)
            names = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            region = settings.s3_region
            endpoint = settings.s3_endpoint or f"https://s3.{region}.amazonaws.com"
        if bool(keys[0]) != bool(keys[1]):
            raise InvalidParamsError(
                f"{url} needs both of {names}, or the files of {names.replace(' and ', '_FILE and ')}_FILE"
            )
        refused = _REFUSED_BY_O3 if url.scheme == "o3" else ()
        return cls(url.container, endpoint.rstrip("/"), region, *keys, names, *times, refused)

    @property
    def signs(self) -> bool:
        """Whether requests are signed; without keys they are anonymous."""
        return bool(self.access_key and self.secret_key)

    def client(self, *, writes: bool) -> Client:
        """obstore's client, for this process. One for writing has no read time-out: that runs while a body is sent too.

        Raises InvalidParamsError if a variable is set that would make obstore send what Akave's gateway refuses.
        """
        from obstore.store import S3Store as Client

        for name in self.refused_environment:
            if os.environ.get(name):
                raise InvalidParamsError(f"{name} is set, and Akave's gateway refuses such requests; unset it")
        options: dict[str, Any] = {}
        if self.access_key and self.secret_key:
            options["credential_provider"] = _StaticCredentials(self.access_key, self.secret_key, self.session_token)
        times: ClientConfig = {
            "connect_timeout": timedelta(seconds=self.connect_timeout_s),
            "timeout": timedelta(seconds=self.timeout_s),
        }
        if not writes:
            times["read_timeout"] = timedelta(seconds=self.read_timeout_s)
        return Client(
            self.bucket,
            # Each is given, so that no AWS_* variable is used in its place.
            endpoint=self.endpoint,
            aws_endpoint_url_s3=self.endpoint,
            region=self.region,
            virtual_hosted_style_request=False,
            skip_signature=not self.signs,
            unsigned_payload=False,
            s3_express=False,
            disable_bulk_delete=True,
            client_options={"allow_http": self.endpoint.startswith("http://"), "user_agent": "shoal", **times},
            retry_config={"max_retries": 0},
            **options,
        )
