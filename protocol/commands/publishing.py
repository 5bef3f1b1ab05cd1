"""PUBLISH: files on the node's machine become shards that others find."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from protocol.commands.common import Params, Result
from protocol.ids import ManifestDigest
from protocol.manifest import MAX_ORIGINS, Manifest, ManifestName, OriginText


class PublishParams(Params, frozen=True, kw_only=True):
    """PUBLISH: take a file, or the files of a folder, into the shards folder, seed and announce them, and if asked
    upload them.
    """

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    """Absolute, on the node's machine: a file, which becomes a loose file, or with a `name` a data set of one; or a
    folder, which becomes a data set, or what its manifest.json says."""
    name: ManifestName | None = None
    """Of the data set; the folder's own name unless given."""
    manifest: Manifest | None = None
    """What the files of the folder `path` must be: they are checked against it, and no manifest.json is read."""
    origins: Annotated[tuple[OriginText, ...], msgspec.Meta(max_length=MAX_ORIGINS)] = ()
    """Where to upload it: some of the origins that the node is configured with."""
    wait: bool = True
    """False: answer at once, with status "publishing", and go on in the background."""


class PublishResult(Result, frozen=True, kw_only=True):
    """Answer of PUBLISH."""

    status: Literal["published", "publishing"]
    name: str
    """Empty while it is not known yet, as `kind`."""
    digest: ManifestDigest | None
    """None while its files are not hashed."""
    kind: str
    shards: int
    bytes: int
    """Of all shards."""
    folder: str
    """Where they lie now, on the node's machine."""
    uploaded_bytes: int
    """Of shards, to all origins; what was there already is not in it."""
    manifest_urls: list[str]
    """Of the manifest, by origin: a node without peers finds it by that."""
