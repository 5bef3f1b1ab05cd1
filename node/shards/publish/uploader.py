"""Uploads what is published to an origin: shards, torrent files and the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from node.origin.interface import ObjectStore
from node.origin.publishing import MissingObjects, OriginPublication, SourceFile, missing_at, publish
from node.shards.publish.manifest_builder import OnHashed, Publication, hash_missing
from node.shards.store.hasher import Hasher
from protocol.manifest import SignedManifest


async def upload(
    store: ObjectStore,
    signed: SignedManifest,
    publication: Publication,
    hasher: Hasher,
    on_hashed: OnHashed,
    on_missing: Callable[[Sequence[MissingObjects]], None],
    on_bytes: Callable[[int], None],
) -> tuple[OriginPublication, Publication]:
    """Upload what the origin lacks, the manifest last. Those files that were not hashed yet are hashed first, and must
    have the content that the manifest says.

    Returns what was uploaded, and the publication with the new hashes. Raises OriginError, InvalidShardError.
    """
    from node.swarm.torrent import Torrent  # imports libtorrent, which not every machine with the command line has

    missing = await missing_at(store, signed.manifest)
    publication = await hash_missing(publication, [one.entry for one in missing], hasher, on_hashed)
    on_missing(missing)
    sources, torrents = {}, {}
    for one in missing:
        entry, hashed = one.entry, publication.hashed[one.entry.content_id]
        size, mtime_ns = hashed.fingerprint.size, hashed.fingerprint.mtime_ns
        sources[entry.content_id] = SourceFile(publication.files[entry.filename], size, mtime_ns)
        if one.torrent:
            torrent = Torrent.of(entry.filename, entry.size, entry.content_id)
            torrents[entry.content_id] = torrent.metainfo(hashed.content.piece_layer)
    return await publish(store, signed, missing, sources, torrents, on_bytes), publication
