"""Announce, find and withdraw: what the packages above call."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from node.background import FirstErrorGroup
from node.clock import Clock
from node.discovery.dht_protocol import DhtProtocol, contact_id
from node.discovery.membership import Membership
from node.discovery.overlay import Overlay
from node.discovery.record_publisher import RecordPublisher, Subject
from node.discovery.storage import RecordStorage
from node.discovery.values import DhtStats, DiscoverySettings, FoundNode, NameInfo, ProviderInfo, WantInfo
from protocol.ids import ContentId, ManifestDigest, NodeId
from protocol.manifest import SignedManifest
from protocol.records import (
    MAX_RECORD_BYTES,
    Name,
    NodeInfo,
    Provider,
    Record,
    RecordKey,
    Want,
    bitmap_from_ids,
    directory_key,
    ids_from_bitmap,
    manifest_key,
    name_key,
    nodes_key,
    wanted_key,
)
from protocol.signing import SigningKey

log = logging.getLogger(__name__)

_PROVIDER_OVERHEAD_BYTES = 160
"""Of a provider record, without host and bitmaps: key, signature, numbers, headers."""
_RECEIVE_BUFFER_BYTES = 1 << 20


class Discovery:
    """One node of the DHT. Lookups also find what this node announced itself, even without a contact.

    No method raises for what peers do: a lookup returns what was found, an announcement that no node took is repeated
    until one does.
    """

    def __init__(
        self,
        settings: DiscoverySettings,
        key: SigningKey,
        protocol: DhtProtocol,
        overlay: Overlay,
        membership: Membership,
        publisher: RecordPublisher,
    ) -> None:
        self.node_id = key.node_id
        self._settings = settings
        self._protocol = protocol
        self._overlay = overlay
        self._membership = membership
        self._publisher = publisher
        self._shards: dict[ManifestDigest, set[Subject]] = {}
        self._node: set[Subject] = set()
        self._wants: dict[ContentId, Subject] = {}
        self._cut: set[ManifestDigest] = set()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        settings: DiscoverySettings,
        key: SigningKey,
        *,
        clock: Clock | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> AsyncIterator[Discovery]:
        """Bind the port, join once, and stay joined in the background; on exit withdraw what was announced.

        No bootstrap node needs to be there yet. `clock` times refreshes and attempts to join, `wall_clock` (Unix time
        in seconds) the expiry of records. Raises OSError if the address cannot be bound.
        """
        discovery = await cls._bind(settings, key, clock or Clock(), wall_clock)
        try:
            async with FirstErrorGroup() as tasks:
                await discovery._membership.join()
                work = [*discovery._membership.start(tasks), *discovery._publisher.start(tasks)]
                try:
                    yield discovery
                finally:
                    for task in work:
                        task.cancel()
                    await discovery._publisher.withdraw_all(settings.withdraw_timeout_s)
        finally:
            discovery._protocol.transport.close()

    @classmethod
    async def _bind(
        cls, settings: DiscoverySettings, key: SigningKey, clock: Clock, wall_clock: Callable[[], float]
    ) -> Discovery:
        # kademlia names every peer of every walk at INFO.
        logging.getLogger("kademlia.crawling").setLevel(logging.WARNING)
        storage = RecordStorage(contact_id(key.node_id), clock=wall_clock)
        protocol = DhtProtocol(key, storage, timeout_s=settings.rpc_timeout_s)
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: protocol, local_addr=(settings.listen_host, settings.port), family=socket.AF_INET
        )
        # Twenty holders may answer with 8 KiB each at one moment.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        overlay = Overlay(protocol, storage, walk_deadline_s=settings.walk_deadline_s, wall_clock=wall_clock)
        membership = Membership(settings, protocol, overlay, clock)
        publisher = RecordPublisher(overlay, key, settings.record_ttl_s, clock, wall_clock=wall_clock)
        protocol.seen, protocol.lost = membership.seen, membership.alone
        protocol.router.crowded = membership.crowded
        membership.joined = publisher.welcome
        return cls(settings, key, protocol, overlay, membership, publisher)

    @property
    def port(self) -> int:
        """UDP port that is bound."""
        return int(self._protocol.transport.get_extra_info("sockname")[1])

    def stats(self) -> DhtStats:
        """Contacts and records of this node now."""
        return DhtStats(nodes=len(self._protocol.router), records=self._overlay.storage.count())

    async def announce_node(self, info: NodeInfo) -> None:
        """Announce this node's addresses and resources; the latest call is refreshed."""
        self._node.add(await self._publisher.announce(nodes_key(self._settings.cluster), info))

    async def announce_shards(
        self,
        signed: SignedManifest,
        on_disk: frozenset[int],
        loaded: frozenset[int],
        rpc_port: int,
        bt_port: int,
        *,
        fetching: frozenset[int] = frozenset(),
    ) -> None:
        """Announce which shards of a manifest this node has and which it is fetching, and the manifest's name.

        There is one provider record a manifest: each call replaces the one before. A model's or data set's name also
        goes into the cluster's directory; a single file is found by its file name.
        """
        manifest, digest, cluster = signed.manifest, signed.digest, self._settings.cluster
        name = manifest.shards[0].filename if manifest.kind == "file" else manifest.name
        naming = Name(name=name, kind=manifest.kind, digest=digest)
        keys = [name_key(cluster, name)]
        if manifest.kind != "file":
            keys.append(directory_key(cluster))
        bitmaps = self._bitmaps(digest, on_disk, loaded, fetching)
        provider = Provider(self._settings.advertise_host, rpc_port, bt_port, *bitmaps)
        subjects = await asyncio.gather(
            self._publisher.announce(manifest_key(cluster, digest), provider),
            *(self._publisher.announce(key, naming) for key in keys),
        )
        self._shards.setdefault(digest, set()).update(subjects)

    async def withdraw_shards(self, digest: ManifestDigest) -> None:
        """Withdraw what `announce_shards` announced of this manifest; does nothing if it announced nothing."""
        self._cut.discard(digest)
        await self._publisher.withdraw(self._shards.pop(digest, set()))

    async def find_providers(self, digest: ManifestDigest) -> list[ProviderInfo]:
        """The other nodes that have shards of a manifest, in random order; of very many a fair sample."""
        found = [
            ProviderInfo(
                node_id=record.publisher,
                host=record.payload.host,
                rpc_port=record.payload.rpc_port,
                bt_port=record.payload.bt_port,
                on_disk=ids_from_bitmap(record.payload.on_disk),
                loaded=ids_from_bitmap(record.payload.loaded),
                fetching=ids_from_bitmap(record.payload.fetching),
            )
            for record in await self._records(manifest_key(self._settings.cluster, digest))
            if isinstance(record.payload, Provider) and record.publisher != self.node_id
        ]
        random.shuffle(found)
        return found

    async def announce_want(
        self, content_id: ContentId, bt_port: int, *, block_pieces: int = 0, ttl_s: int = 12
    ) -> None:
        """Announce that this node fetches its part of a content from the origin, in blocks of so many pieces.

        The record is refreshed until it is withdrawn, and expires `ttl_s` after the node has died.

        """
        want = Want(self._settings.advertise_host, bt_port, block_pieces)
        key = wanted_key(self._settings.cluster, content_id)
        self._wants[content_id] = (
            key,
            self.node_id,
            b"",
        )  # before the call: a caller that is cancelled meanwhile withdraws it too
        await self._publisher.announce(key, want, ttl_s=ttl_s)

    async def withdraw_want(self, content_id: ContentId) -> None:
        """Withdraw that announcement; does nothing if there is none."""
        if subject := self._wants.pop(content_id, None):
            await self._publisher.withdraw([subject])

    async def find_wants(self, content_id: ContentId) -> list[WantInfo]:
        """The other nodes that fetch parts of a content from the origin now; by node id."""
        found = [
            WantInfo(record.publisher, record.payload.host, record.payload.bt_port, record.payload.block_pieces)
            for record in await self._records(wanted_key(self._settings.cluster, content_id))
            if isinstance(record.payload, Want) and record.publisher != self.node_id
        ]
        return sorted(found, key=lambda want: want.node_id)

    async def find_name(self, name: str) -> list[NameInfo]:
        """What a model, data set or file name stands for; several if publishers differ."""
        return [found for found in await self._names(name_key(self._settings.cluster, name)) if found.name == name]

    async def list_names(self) -> list[NameInfo]:
        """The models and data sets of the cluster."""
        return [found for found in await self._names(directory_key(self._settings.cluster)) if found.kind != "file"]

    async def list_nodes(self) -> list[FoundNode]:
        """The nodes of the cluster that announced themselves, this one included; by node id."""
        records = await self._records(nodes_key(self._settings.cluster))
        found = [FoundNode(r.publisher, r.payload) for r in records if isinstance(r.payload, NodeInfo)]
        return sorted(found, key=lambda node: node.node_id)

    async def _names(self, key: RecordKey) -> list[NameInfo]:
        publishers: dict[Name, set[NodeId]] = {}
        for record in await self._records(key):
            named = record.payload
            if isinstance(named, Name):
                publishers.setdefault(named, set()).add(record.publisher)
        found = [NameInfo(n.name, n.kind, n.digest, tuple(sorted(by))) for n, by in publishers.items()]
        return sorted(found, key=lambda name: (name.name, name.digest))

    async def _records(self, key: RecordKey) -> list[Record]:
        await self._membership.join_if_alone()
        return await self._overlay.records(key)

    def _bitmaps(
        self, digest: ManifestDigest, on_disk: frozenset[int], loaded: frozenset[int], fetching: frozenset[int]
    ) -> tuple[bytes, bytes, bytes]:
        """The bitmaps of a record; that of the shards on disk is cut if the record would be too large."""
        room = MAX_RECORD_BYTES - _PROVIDER_OVERHEAD_BYTES - len(self._settings.advertise_host)
        loaded_bits = bitmap_from_ids(loaded)[:room]
        fetching_bits = bitmap_from_ids(fetching)[: room - len(loaded_bits)]
        room -= len(loaded_bits) + len(fetching_bits)
        on_disk_bits = bitmap_from_ids(on_disk)
        if len(on_disk_bits) > room and digest not in self._cut:
            self._cut.add(digest)
            log.warning("manifest %s has so many shards that only the first %d can be announced", digest, room * 8)
        return on_disk_bits[:room], loaded_bits, fetching_bits
