"""From a node's settings to those of its origins."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from node.config import Settings
from node.origin.settings import OriginSettings


def origin_settings(
    settings: Settings, env: Mapping[str, str] = os.environ, *, origins: Sequence[str] | None = None
) -> OriginSettings:
    """What a node's settings say of origins, with the credentials of the environment; `origins` instead of its own.

    Raises InvalidParamsError for what cannot be.
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
