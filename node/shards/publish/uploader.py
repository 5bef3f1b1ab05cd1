"""Brings what is published to an origin: shards, torrent files and the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from node.origin.interface import ObjectStore
from node.origin.publishing import MissingObjects, PublishResult, SourceFile, missing_at, publish
from node.shards.publish.manifest_builder import Chosen, OnHashed, checked
from node.shards.store.hasher import Hasher
from protocol.manifest import SignedManifest


async def upload(
    store: ObjectStore,
    signed: SignedManifest,
    chosen: Chosen,
    hasher: Hasher,
    on_hashed: OnHashed,
    on_missing: Callable[[Sequence[MissingObjects]], None],
    on_bytes: Callable[[int], None],
) -> tuple[PublishResult, Chosen]:
    """Upload what is not there yet, the manifest last. Files that go and were not hashed yet are hashed first, and must
    be what the manifest says; returned with what came of it.

    Raises OriginError, InvalidShardError.
    """
    from node.swarm.torrent import Torrent  # brings libtorrent, which is not everywhere where a command is typed

    missing = await missing_at(store, signed.manifest)
    chosen = await checked(chosen, [one.entry for one in missing], hasher, on_hashed)
    on_missing(missing)
    sources, torrents = {}, {}
    for one in missing:
        entry = one.entry
        content, seen = chosen.hashed[entry.content_id].content, chosen.hashed[entry.content_id].fingerprint
        sources[entry.content_id] = SourceFile(chosen.files[entry.filename], seen.size, seen.mtime_ns)
        if one.torrent:
            torrent = Torrent.of(entry.filename, entry.size, entry.content_id)
            torrents[entry.content_id] = torrent.metainfo(content.piece_layer)
    return await publish(store, signed, missing, sources, torrents, on_bytes), chosen
