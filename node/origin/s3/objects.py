"""What S3 says of an object, as ours."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from node.origin.interface import ObjectInfo


def plain_etag(etag: str | None) -> str | None:
    """Without the quotes that HTTP has around it."""
    return etag.strip('"') if etag else None


def object_info(key: str, meta: Mapping[str, Any], attributes: Mapping[Any, str]) -> ObjectInfo:
    """An object, by obstore's `ObjectMeta` and attributes."""
    metadata = {str(name): value for name, value in attributes.items()}
    return _info(key, meta["size"], meta["e_tag"], meta["last_modified"], metadata)


def info_by_botocore(key: str, answer: Mapping[str, Any]) -> ObjectInfo:
    """An object, by the answer to a HEAD, or by one entry of a listing."""
    size = answer["Size"] if "Size" in answer else answer["ContentLength"]
    return _info(key, size, answer.get("ETag"), answer.get("LastModified"), dict(answer.get("Metadata") or {}))


def _info(key: str, size: int, etag: str | None, modified: datetime | None, metadata: Mapping[str, str]) -> ObjectInfo:
    by_name = {name.lower(): value for name, value in metadata.items()}
    return ObjectInfo(
        key=key,
        size=size,
        etag=plain_etag(etag),
        modified_s=modified.timestamp() if modified else None,
        metadata=metadata,
        root_cid=by_name.get("network-root-cid") or None,
        network_state=by_name.get("network-state") or None,
    )
