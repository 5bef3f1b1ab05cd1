"""A node for the command line to talk to: the real RPC server, in a thread, with handlers that know their answers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from node.rpc import Call, Command, RpcServer
from protocol.commands.nodes import (
    DhtStatus,
    DownloadStatus,
    NodeEntry,
    NodesResult,
    StageStatus,
    StatusResult,
    SwarmStatus,
    TransportStatus,
)
from protocol.commands.shards import FileInfo, GetManifestResult, ListFilesResult, ShardResult, UnpinResult
from protocol.commands.tasks import InferenceResult, StageAssignment, TaskOutput, Timings, Usage
from protocol.errors import ShardInUseError, ShardNotFoundError
from protocol.ids import ContentId, ManifestDigest, NodeId
from protocol.manifest import Manifest, ShardEntry, sign_manifest
from protocol.signing import SigningKey

NODE = NodeId("ab" * 32)
PIECES = ["Fish ", "swim \u00e9", " [in] shoals"]
STATUS = StatusResult(
    node_id=NODE,
    cluster="reef",
    uptime_s=12.5,
    versions={"shoal": "0.1.0"},
    memory={"total_bytes": 8 << 30, "available_bytes": 3 << 30, "process_bytes": 100 << 20},
    threads=2,
    stages=[
        StageStatus(
            model="[smol]",
            digest=ManifestDigest("ef" * 32),
            shards=[0, 2],
            sessions=1,
            pid=77,
            memory_bytes=5 << 20,
            forwards=10,
            forward_s=0.5,
            ticket="t",
        )
    ],
    downloads=[
        DownloadStatus(
            filename="shard-1.gguf",
            content_id=ContentId("cd" * 32),
            bytes_done=50,
            bytes_total=200,
            rate_bytes_s=1024.0,
            peers=3,
        )
    ],
    swarm=SwarmStatus(uploaded_bytes=7, downloaded_bytes=9, peers=3, torrents=4),
    dht=DhtStatus(nodes=5, records=6),
    transport=TransportStatus(),
)


SET = sign_manifest(
    Manifest(
        name="set",
        kind="dataset",
        shards=tuple(
            ShardEntry(shard_id=i, filename=f"{i}.bin", size=1 << 20, content_id=ContentId(f"{i:064x}"), kind="file")
            for i in range(3)
        ),
    ),
    SigningKey(bytes(32)),
)


@dataclass
class FakeNode:
    """What it was asked, and where."""

    port: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def commands(self) -> dict[str, Command]:
        return {
            "STATUS": Command(None, self._status),
            "NODES": Command(None, self._nodes),
            "EXECUTE_TASK": Command(None, self._task),
            "LOAD_SHARD": Command(None, self._load),
            "GET_MANIFEST": Command(None, self._manifest),
            "LIST_FILES": Command(None, self._files),
            "UNPIN": Command(None, self._unpin),
            "EVICT_SHARD": Command(None, self._evict),
        }

    async def _status(self, params: dict[str, Any], call: Call) -> StatusResult:
        return STATUS

    async def _nodes(self, params: dict[str, Any], call: Call) -> NodesResult:
        return NodesResult(
            nodes=[
                NodeEntry(
                    node_id=NodeId(digit * 64),
                    host="10.0.0.5",
                    rpc_port=7400,
                    dht_port=7401,
                    bt_port=7402,
                    memory_available_bytes=3 << 30,
                    cores=8,
                    here=digit == "a",
                )
                for digit in "ab"
            ]
        )

    async def _task(self, params: dict[str, Any], call: Call) -> InferenceResult:
        self.asked.append(params)
        if params["model"] == "cold":
            progress = {"request_id": call.request_id, "shard_id": 4, "bytes_done": 1 << 20, "bytes_total": 2 << 20}
            call.notify("PROGRESS", progress | {"phase": "downloading"})
        if params["stream"]:
            for number, text in enumerate(PIECES):
                call.notify("TASK_OUTPUT", TaskOutput(request_id=call.request_id, text=text, tokens=[number]))
        return InferenceResult(
            text="".join(PIECES),
            tokens=[0, 1, 2],
            finish_reason="length",
            usage=Usage(prompt_tokens=9, completion_tokens=3),
            timings=Timings(load_s=0.0, time_to_first_token_s=0.25, total_s=1.0, tokens_per_s=12.5),
            stages=[StageAssignment(node=NODE, shards=[0], layers=(0, 30))],
        )

    async def _manifest(self, params: dict[str, Any], call: Call) -> GetManifestResult:
        return GetManifestResult(signed=SET, digest=SET.digest)

    async def _files(self, params: dict[str, Any], call: Call) -> ListFilesResult:
        """The last shard is not here."""
        files = [
            FileInfo(
                filename=f"[set]@{SET.digest[:12]}/{entry.filename}",
                size=entry.size,
                kind=entry.kind,
                state="seeding",
                content_id=entry.content_id,
                dataset="set",
                shard_id=entry.shard_id,
                leases=entry.shard_id,
                pinned=entry.shard_id == 0,
            )
            for entry in SET.manifest.shards[:2]
        ]
        return ListFilesResult(files=files)

    async def _unpin(self, params: dict[str, Any], call: Call) -> UnpinResult:
        self.asked.append(params)
        return UnpinResult(digest=SET.digest, shard_ids=[0], bytes=1 << 20, evictable_bytes=2 << 20)

    async def _evict(self, params: dict[str, Any], call: Call) -> ShardResult:
        self.asked.append(params)
        if params["shard_id"] == 1:
            raise ShardInUseError("shard 1 is held by 1 lease")
        entry = SET.manifest.shards[params["shard_id"]]
        return ShardResult(
            shard_id=entry.shard_id,
            status="evicted",
            path="/data/0.bin",
            source="local",
            bytes=entry.size,
            seconds=0.0,
            content_id=entry.content_id,
        )

    async def _load(self, params: dict[str, Any], call: Call) -> None:
        call.notify("PROGRESS", {"request_id": call.request_id, "bytes_done": 1})
        raise ShardNotFoundError("smol has no shard 9", {"shards": 3, "raw": b"\x01\xff"})


@contextlib.contextmanager
def fake_node() -> Iterator[FakeNode]:
    node, ready = FakeNode(), threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with RpcServer(node.commands(), NODE).serve() as server:
            node.port = server.port
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield node
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
