"""A peer that gives out a manifest whose names lead out of the shards folder: real DHT, real RPC, a real daemon."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from node.discovery import Discovery, DiscoverySettings
from node.rpc import Call, Command, RpcServer
from protocol.commands.shards import GetManifestParams
from protocol.errors import NoSourceError
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import Manifest, ShardEntry, SignedManifest
from protocol.signing import SigningKey
from tests.support.daemons import Daemon, daemon
from tests.support.waiting import wait_until

EVIL_FILES = ["../evil.gguf", "/tmp/evil.gguf", "..", ".hidden.gguf", "a/b.gguf", "a\\b.gguf", "nul\0.gguf", "e" * 300]
REFUSED_FILES = ["manifest.json", "MANIFEST.JSON", "evil.gguf.part", "evil.tmp"]
"""Plain names, but those of a node's own files."""
EVIL_NAMES = ["..", "../..", "../../evil", "/etc/evil", "a/../../evil", ".ssh"]
ODD_NAMES = ["org/model", "a b:c*?", "~", "$HOME", "-rf", "con.", "\u202eevil", "n" * 200]
"""Names that a person may give; their folders are named otherwise."""


def manifest(filename: str = "shard-0.gguf", name: str = "model") -> SignedManifest:
    """Signed as it is: the constructors check nothing, and a hostile peer would not either."""
    entry = ShardEntry(shard_id=0, filename=filename, size=1 << 20, content_id=ContentId("ab" * 32), kind="file")
    body = Manifest(name=name, kind="dataset", shards=(entry,))
    key = SigningKey.generate()
    return SignedManifest(
        manifest=body,
        publisher=key.node_id,
        signature=key.sign(b"shoal-manifest-v1\0" + body.canonical_body()).hex(),
    )


class HostilePeer:
    """Announces that it has every shard of some manifests, and gives them out when asked."""

    def __init__(self, discovery: Discovery, port: int) -> None:
        self.discovery, self.port = discovery, port
        self.given: list[ManifestDigest] = []
        self.has: dict[ManifestDigest, SignedManifest] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def beside(cls, node: Daemon) -> AsyncIterator[HostilePeer]:
        key = SigningKey.generate()
        settings = DiscoverySettings(
            cluster="default", advertise_host="127.0.0.1", bootstrap=(("127.0.0.1", node.ports["dht"]),)
        )
        commands: dict[str, Command] = {}
        async with Discovery.open(settings, key) as discovery, RpcServer(commands, key.node_id).serve() as server:
            peer = cls(discovery, server.port)
            commands["GET_MANIFEST"] = Command(GetManifestParams, peer._give)
            yield peer

    async def offer(self, signed: SignedManifest) -> ManifestDigest:
        """Announced under a harmless name, or the DHT itself would refuse it."""
        self.has[signed.digest] = signed
        harmless = SimpleNamespace(kind="dataset", name="harmless")
        announced = cast(Any, SimpleNamespace(manifest=harmless, digest=signed.digest))
        await self.discovery.announce_shards(announced, frozenset({0}), frozenset(), self.port, 9)
        return signed.digest

    async def _give(self, params: GetManifestParams, call: Call) -> dict[str, Any]:
        assert params.digest is not None
        self.given.append(params.digest)
        return {"signed": msgspec.to_builtins(self.has[params.digest]), "digest": params.digest}


async def test_names_from_a_peer_never_lead_out_of_the_shards_folder(tmp_path: Path) -> None:
    home = tmp_path / "outer" / "inner" / "victim"
    with daemon(home) as node:
        async with HostilePeer.beside(node) as peer:
            before = everything(tmp_path, but=home / "shards")

            for signed in [*map(manifest, EVIL_FILES), *(manifest(name=name) for name in EVIL_NAMES)]:
                digest = await peer.offer(signed)
                with pytest.raises(NoSourceError, match="no node gives manifest"):
                    await ask(node, "FETCH_SHARD", {"dataset": digest, "shard_id": 0})
                assert digest in peer.given, "it was not even asked: the test sees nothing"
            assert everything(home / "shards") == set()

            for signed in map(manifest, REFUSED_FILES):
                digest = await peer.offer(signed)
                await ask(node, "FETCH_SHARD", {"dataset": digest, "shard_id": 0, "wait": False}, request_id=digest)
                await seen(lambda digest=digest: f"request {digest}: a shard cannot be called" in node.log)  # type: ignore[misc]

            for name in ODD_NAMES:
                digest = await peer.offer(manifest(name=name))
                await ask(node, "FETCH_SHARD", {"dataset": digest, "shard_id": 0, "wait": False}, request_id=digest)
                await seen(lambda digest=digest: any((home / "shards").glob(f"*@{digest[:12]}/manifest.json")))  # type: ignore[misc]
                assert (await ask(node, "CANCEL", {"request_id": digest}))["cancelled"] is True
            allowed = before | {home / "index.sqlite-journal"}
            await seen(lambda: everything(tmp_path, but=home / "shards") <= allowed)


async def seen(condition: Any) -> None:
    """Looked for in a thread: the peer lives on this loop, and has to answer meanwhile."""
    await asyncio.to_thread(wait_until, condition)


async def ask(node: Daemon, method: str, params: dict[str, Any], **options: Any) -> Any:
    return await asyncio.to_thread(node.call, method, params, **options)


def everything(folder: Path, but: Path | None = None) -> set[Path]:
    return {path for path in folder.rglob("*") if but is None or but not in path.parents}
