"""What LIST_FILES says of a file."""

from __future__ import annotations

import os
from pathlib import Path

from node.shards.store.catalog import ShardFile
from protocol.commands.shards import FileInfo, FileState


def file_info(file: ShardFile, root: Path, *, loaded: bool, leases: int) -> FileInfo:
    """`root` is the shards folder; `loaded` says whether a stage has the shard, `leases` how many hold it."""
    entry, manifest = (file.shard.entry, file.shard.manifest) if file.shard else (None, None)
    state: FileState = "loaded" if loaded and file.state == "seeding" else file.state
    size = file.fingerprint.size if file.fingerprint else 0
    return FileInfo(
        filename=os.fsencode(file.path.relative_to(root)).decode(errors="replace"),
        size=entry.size if entry and file.state != "invalid" else size,
        kind=file.kind,
        state=state,
        info_hash=file.torrent.info_hash if file.torrent else None,
        content_id=entry.content_id if entry else None,
        model=manifest.name if manifest and manifest.kind == "model" else None,
        dataset=manifest.name if manifest and manifest.kind == "dataset" else None,
        shard_id=entry.shard_id if entry else None,
        error=file.error,
        leases=leases,
    )
