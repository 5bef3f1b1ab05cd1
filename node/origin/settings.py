"""The settings of origins: URLs, endpoints, credentials and time-outs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from node.origin.core.credentials import Credentials
from protocol.errors import InvalidParamsError

if TYPE_CHECKING:
    from node.config import Settings

O3_ENDPOINT = "https://o3-rc2.akave.xyz"
"""Akave's community gateway (docs.akave.xyz); a credential may be for another one."""
O3_REGION = "akave-network"

Backend = Literal["auto", "gateway", "native"]


@dataclass(frozen=True)
class OriginSettings:
    """One process's settings. The constructor raises InvalidParamsError for a value that is not allowed."""

    origins: tuple[str, ...] = ()
    """URLs; the first one is asked first."""
    o3_endpoint: str = O3_ENDPOINT
    o3_region: str = O3_REGION
    o3_backend: Backend = "auto"
    """How o3:// is reached: through the S3 gateway, through the native SDK, or auto: native if the SDK can be imported
    and AKAVE_PRIVATE_KEY is set. akave:// is always native."""
    s3_endpoint: str | None = None
    """None: Amazon's endpoint of the region."""
    s3_region: str = "us-east-1"
    s3_part_bytes: int = 8 << 20
    """The least part of an upload to S3 or O3; an object above twice this goes in parts. S3 takes none below 5 MiB."""
    hf_endpoint: str = "https://huggingface.co"
    akave_node: str = "connect.akave.ai:5500"
    """HOST:PORT of an Akave node, for the native SDK."""
    akave_ipc: str | None = None
    """HOST:PORT of the IPC service of that node; None: the same."""
    encryption_key_file: Path | None = None
    """A file with the key that objects are encrypted with before they leave this machine; None: no encryption."""
    credentials: Credentials = field(default_factory=Credentials)
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    """For the next byte of an answer."""
    timeout_s: float = 6 * 3600.0
    """For a whole request. A large shard may take hours; `read_timeout_s` ends a request that hangs."""
    find_timeout_s: float = 30.0
    """For one origin to find the manifest of a name or URL."""
    retry_total_s: float = 20.0
    """How long a store repeats a request: less than half of the fetcher's `stall_timeout_s`, or the fetcher gives up
    before it learns what the origin answered."""

    def __post_init__(self) -> None:
        if self.o3_backend not in ("auto", "gateway", "native"):
            raise InvalidParamsError(f"the O3 backend is {self.o3_backend!r}; it must be auto, gateway or native")
        for name in ("o3_endpoint", "s3_endpoint", "hf_endpoint"):
            endpoint = getattr(self, name)
            if endpoint is not None and not endpoint.startswith(("https://", "http://")):
                raise InvalidParamsError(f"{name} is {endpoint!r}; it must be https://HOST[:PORT]")
        for name in ("connect_timeout_s", "read_timeout_s", "timeout_s", "find_timeout_s", "s3_part_bytes"):
            if not getattr(self, name) > 0:
                raise InvalidParamsError(f"{name} is {getattr(self, name)}; it must be above 0")

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ, **overrides: Any) -> OriginSettings:
        """Settings from the environment: credentials, SHOAL_* of Akave, and the variables that S3 tools use.

        `overrides` are fields of this class; one that is None leaves the default. Raises InvalidParamsError.
        """
        found: dict[str, Any] = {
            "credentials": Credentials.from_environment(env),
            "o3_endpoint": env.get("SHOAL_O3_ENDPOINT"),
            "o3_region": env.get("SHOAL_O3_REGION"),
            "akave_node": env.get("SHOAL_AKAVE_NODE"),
            "akave_ipc": env.get("SHOAL_AKAVE_IPC"),
            "s3_endpoint": env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL"),
            "s3_region": env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION"),
            "hf_endpoint": env.get("HF_ENDPOINT"),
        }
        unknown = overrides.keys() - {one.name for one in fields(cls)}
        if unknown:
            raise InvalidParamsError(f"origins have no setting {sorted(unknown)[0]!r}")
        found = {name: value for name, value in found.items() if value}
        return cls(**found | {name: value for name, value in overrides.items() if value is not None})


def origin_settings(
    settings: Settings, env: Mapping[str, str] = os.environ, *, origins: Sequence[str] | None = None
) -> OriginSettings:
    """The settings of a node's origins, with the credentials of the environment; `origins` replaces the node's own.

    Raises InvalidParamsError for a value that is not allowed.
    """
    return OriginSettings.from_environment(
        env,
        origins=tuple(settings.origins if origins is None else origins),
        o3_endpoint=settings.o3_endpoint,
        o3_region=settings.o3_region,
        o3_backend=settings.o3_backend,
        s3_endpoint=settings.s3_endpoint,
        akave_node=settings.akave_node,
        akave_ipc=settings.akave_ipc,
        encryption_key_file=settings.origin_key_file,
    )
