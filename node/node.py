"""The composition root: builds the parts of a node, runs them, and ends them in order."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass

from node.background import Background
from node.clock import Clock
from node.config import KEY_FILENAME, Assignment, Settings
from node.discovery import Discovery, DiscoverySettings, ProviderInfo
from node.handlers.info import InfoHandlers, NodeParts, current_info
from node.handlers.leases import LeaseHandlers
from node.handlers.publishing import PublishHandlers
from node.handlers.sessions import SessionHandlers
from node.handlers.shards import ProgressReport, ShardHandlers, ShardLoader
from node.handlers.table import command_table
from node.http import HttpServer, render_metrics
from node.machine import available_memory_bytes, usable_cores
from node.origin.registry import OriginRegistry
from node.origin.settings import origin_settings
from node.pipeline.engine.settings import EngineSettings
from node.pipeline.stage.process import StageSettings
from node.pipeline.stage.stages import Stages
from node.rpc import Command, RpcServer
from node.shards.kept_manifests import KeptManifests
from node.shards.service import Shards
from node.shards.settings import ShardsSettings
from node.swarm import Swarm, SwarmSettings
from node.tasks.registry import TaskContext, TaskRegistry
from protocol.client import call_address
from protocol.commands.shards import GetManifestParams
from protocol.errors import InvalidManifestError, ShoalError
from protocol.ids import ManifestDigest, NodeId
from protocol.manifest import SignedManifest, manifest_from_wire
from protocol.records import NodeInfo
from protocol.signing import SigningKey

log = logging.getLogger(__name__)

RETRY_ASSIGNMENT_S = 2.0
LONGEST_RETRY_S = 30.0
ANNOUNCE_NODE_S = 60.0
MANIFEST_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class NodePorts:
    """The ports that a node listens on."""

    node_id: NodeId
    rpc_port: int
    dht_port: int
    bt_port: int
    http_port: int


async def run_node(settings: Settings, *, stop: asyncio.Event, on_ready: Callable[[NodePorts], None]) -> None:
    """Run a node until `stop` is set. Raises OSError if a port is taken, and what a part fails with.

    The parts end in the reverse order: first no new requests, then the engines, then what tells others about us.
    """
    key = SigningKey.load_or_create(settings.data_dir / KEY_FILENAME)
    advertise = settings.advertise or _own_address(settings.listen)
    engine = EngineSettings(
        threads=settings.threads,
        ctx_size=settings.ctx_size,
        max_sessions=settings.max_sessions,
        gpu_layers=settings.gpu_layers,
    )
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        rpc_socket = stack.enter_context(bound_socket(settings.listen, settings.rpc_port))
        rpc_port = rpc_socket.getsockname()[1]
        swarm = await enter(Swarm.open(swarm_settings(settings)))
        with _naming("the DHT", settings.listen, settings.dht_port):
            discovery = await enter(Discovery.open(_discovery_settings(settings, advertise), key))
        origins = await enter(OriginRegistry.open(origin_settings(settings), trusted=settings.manifests))
        shards = await enter(
            Shards.open(
                ShardsSettings(settings.shards_dir, settings.data_dir, min_free_disk=settings.min_free_disk),
                swarm=swarm,
                discovery=discovery,
                fetch_manifest=fetch_manifest,
                key=key,
                rpc_port=rpc_port,
                origin=origins,
            )
        )
        stages = await enter(
            Stages.open(
                StageSettings(engine=engine, share_cores=settings.share_cores),
                on_died=lambda model, lost, why: _engine_died(background, loader, model, lost, why),
            )
        )
        background = await enter(Background.open())  # inside the stages: what still loads ends before they do
        loader = ShardLoader(shards, stages, engine)
        commands: dict[str, Command] = {}
        server = RpcServer(commands, key.node_id)
        here = NodeInfo(advertise, rpc_port, discovery.port, swarm.port, available_memory_bytes(), usable_cores())
        info = InfoHandlers(
            node_id=key.node_id,
            cluster=settings.cluster,
            threads=settings.threads,
            here=here,
            parts=NodeParts(swarm, discovery, origins, shards, stages),
            server=server,
            background=background,
        )
        context = TaskContext(
            key.node_id, (_reached_at(settings.listen), rpc_port), shards, stages, discovery, settings.ctx_size
        )
        commands |= command_table(
            ShardHandlers(shards, loader, background),
            LeaseHandlers(shards),
            PublishHandlers.of(settings, shards.publisher, key, origins.urls, background),
            info,
            SessionHandlers(stages, background),
            TaskRegistry.from_entry_points().handler(context),
        )
        await enter(server.serve(bound=rpc_socket))

        async def metrics() -> bytes:
            return render_metrics(await info.status(), shards.files())

        with _naming("HTTP", settings.listen, settings.http_port):
            http = await enter(
                HttpServer.serve(
                    settings.listen,
                    settings.http_port,
                    health=lambda: {"status": "ok", "node_id": key.node_id},
                    metrics=metrics,
                )
            )
        background.start(_announce_node(discovery, here), name="announcing the node")
        kept = KeptManifests(shards, settings.shards_dir, Clock())
        for url in settings.manifests:
            background.start(kept.keep(url), name=f"manifest {url}")
        for assignment in settings.assign:
            for shard_id in assignment.shard_ids:
                background.start(
                    _load_assigned(shards, loader, assignment, shard_id),
                    name=f"assignment {assignment.model}:{shard_id}",
                )
        if not stop.is_set():
            on_ready(NodePorts(key.node_id, rpc_port, discovery.port, swarm.port, http.port))
        await stop.wait()


async def fetch_manifest(provider: ProviderInfo, digest: ManifestDigest) -> SignedManifest:
    """Ask a provider for a manifest and check it. Raises InvalidManifestError, UnreachableError, TimedOutError."""
    result = await call_address(
        provider.host,
        provider.rpc_port,
        "GET_MANIFEST",
        GetManifestParams(digest=digest),
        result_type=dict,
        recipient=provider.node_id,
        timeout_s=MANIFEST_TIMEOUT_S,
    )
    if "signed" not in result:
        raise InvalidManifestError(f"{provider.host}:{provider.rpc_port} answered GET_MANIFEST without a manifest")
    return manifest_from_wire(result["signed"], digest)


async def _announce_node(discovery: Discovery, here: NodeInfo) -> None:
    """Announce this node's address and its free memory, again and again."""
    while True:
        try:
            await discovery.announce_node(current_info(here))
        except ShoalError as error:
            log.warning("this node could not be announced: %s", error)
        await asyncio.sleep(ANNOUNCE_NODE_S)


async def _load_assigned(shards: Shards, loader: ShardLoader, assignment: Assignment, shard_id: int) -> None:
    """Load one `--assign`ed shard; a model or a provider that is not there yet may come later."""
    told, pause_s = "", RETRY_ASSIGNMENT_S
    while True:
        try:
            signed = await shards.resolve("model", assignment.model)
            await loader.load(signed.shard(shard_id), ProgressReport(None, shard_id))
        except ShoalError as error:
            level = logging.DEBUG if error.code == told else logging.WARNING
            log.log(level, "assigned shard %s:%d is not loaded yet: %s", assignment.model, shard_id, error)
            told = error.code
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_RETRY_S)
        else:
            log.info("assigned shard %s:%d is loaded", assignment.model, shard_id)
            return


def _engine_died(
    background: Background, loader: ShardLoader, model: ManifestDigest, lost: frozenset[int], why: str
) -> None:
    if lost:
        log.error(
            "the engine of model %s is gone (%s); shards %s are not loaded any more", model[:16], why, sorted(lost)
        )
        background.start(loader.tell_loaded(model), name="telling that an engine died")


def swarm_settings(settings: Settings) -> SwarmSettings:
    """The swarm settings of a node with these settings."""
    return SwarmSettings(
        state_dir=settings.data_dir / "swarm",
        listen_host=settings.listen,
        port=settings.bt_port or _free_port(settings.listen),
        upload_limit_bytes_s=int(settings.upload_limit),
        download_limit_bytes_s=int(settings.download_limit),
    )


def _free_port(listen: str) -> int:
    """A TCP port that is free on all addresses, or 0 if there is only one address: asked for any port, libtorrent
    takes another one for each address, and others are told a single one.
    """
    if listen != "0.0.0.0":
        return 0
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((listen, 0))
        return int(probe.getsockname()[1])


def _discovery_settings(settings: Settings, advertise: str) -> DiscoverySettings:
    return DiscoverySettings(
        cluster=settings.cluster,
        advertise_host=advertise,
        listen_host=settings.listen,
        port=settings.dht_port,
        bootstrap=tuple((address.host, address.port) for address in settings.bootstrap),
    )


def bound_socket(host: str, port: int) -> socket.socket:
    """A TCP socket that has its port but does not listen yet. Raises OSError."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _naming("RPC", host, port):
            bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


@contextmanager
def _naming(what: str, host: str, port: int) -> Iterator[None]:
    """Name in an OSError about an address what was to listen there."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        known = error.errno is not None and error.errno > 0  # getaddrinfo's are not
        reason = os.strerror(error.errno) if known and error.errno else error.strerror
        raise OSError(error.errno, f"{what} cannot listen on {host}:{port}: {reason}") from None


def _reached_at(listen: str) -> str:
    """How this machine reaches what listens at an address."""
    return "127.0.0.1" if listen == "0.0.0.0" else listen


def _own_address(listen: str) -> str:
    """What to advertise if nothing was given: the address that we listen on, or for all of them the one that
    packets to the outside would leave from (no packet is sent).
    """
    if listen != "0.0.0.0":
        return listen
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            log.warning("this machine has no route out, so others are told 127.0.0.1: give --advertise HOST")
            return "127.0.0.1"
