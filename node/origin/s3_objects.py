"""What S3 says of an object, as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from node.origin.interface import ObjectInfo


def plain_etag(etag: str | None) -> str | None:
    """Without the quotes that HTTP has around it."""
    return etag.strip('"') if etag else None


def object_info(key: str, meta: Mapping[str, Any], attributes: Mapping[Any, str]) -> ObjectInfo:
    """An object, by obstore's `ObjectMeta` and attributes."""
    metadata = {str(name): value for name, value in attributes.items()}
    by_name = {name.lower(): value for name, value in metadata.items()}
    return ObjectInfo(
        key=key,
        size=meta["size"],
        etag=plain_etag(meta["e_tag"]),
        modified_s=meta["last_modified"].timestamp(),
        metadata=metadata,
        root_cid=by_name.get("network-root-cid") or None,
        network_state=by_name.get("network-state") or None,
    )
