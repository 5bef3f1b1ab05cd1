"""A node and a chain for the real akavesdk, both in this process: its gRPC service on loopback, by the SDK's own stubs,
and what the SDK asks of the contracts. For the tests of the marker `akavesdk` alone; it checks nothing that a real
node or a contract would (signatures, permits, funds).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

BUCKET_ID = b"\x07" * 32


@dataclass
class Stored:
    """One file: for each chunk its CID, plain and encoded size, and the CIDs of its blocks."""

    chunks: list[Any] = field(default_factory=list)
    root_cid: str = ""
    size: int = 0
    encoded: int = 0


@dataclass
class World:
    address: str = ""
    buckets: set[str] = field(default_factory=set)
    files: dict[str, Stored] = field(default_factory=dict)
    blocks: dict[str, bytes] = field(default_factory=dict)
    nonce: int = 0
    lost: int = 0
    ranges: list[tuple[int, int]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def transaction(self) -> str:
        with self.lock:
            nonce = self.nonce
        time.sleep(0.02)
        with self.lock:
            if nonce != self.nonce:
                self.lost += 1
                raise ValueError("{'code': -32000, 'message': 'nonce too low'}")
            self.nonce += 1
        return f"0x{nonce:064x}"


class Storage:
    """The storage contract."""

    contract_address = "0x" + "ab" * 20

    def __init__(self, world: World) -> None:
        self.world = world

    def get_chain_id(self) -> int:
        return 1

    def create_bucket(self, *, bucket_name: str, **_: Any) -> str:
        tx = self.world.transaction()
        self.world.buckets.add(bucket_name)
        return tx

    def get_bucket_by_name(self, *args: Any, **named: Any) -> tuple[bytes, str]:
        return BUCKET_ID, named.get("bucket_name") or args[1]

    def create_file(self, address: str, key: Any, bucket_id: bytes, name: str, nonce_manager: Any = None) -> str:
        if name in self.world.files:
            raise ValueError("execution reverted: 0x6891dde0")
        tx = self.world.transaction()
        self.world.files[name] = Stored()
        return tx

    def add_file_chunk(self, *_: Any, **__: Any) -> str:
        return self.world.transaction()

    def is_file_filled(self, file_id: bytes) -> bool:
        return True

    def get_file_by_name(self, call_opts: Any, bucket_id: bytes, name: str) -> tuple[bytes, str]:
        if name not in self.world.files:
            raise ValueError("execution reverted: FileNonexists")
        return b"\x01" * 32, name

    def get_file_index_by_id(self, call_opts: Any, bucket: str, file_id: bytes) -> int:
        return 0

    def commit_file(
        self, bucket_id: bytes, name: str, encoded: int, size: int, root: bytes, address: str, key: Any
    ) -> str:
        from multiformats import CID

        file = self.world.files[name]
        file.root_cid, file.size, file.encoded = str(CID.decode(root)), size, encoded
        return self.world.transaction()

    def delete_file(self, auth: Any, file_id: bytes, bucket_id: bytes, name: str, index: int) -> str:
        tx = self.world.transaction()
        del self.world.files[name]
        return tx


def _service(world: World) -> Any:
    """The node's gRPC service."""
    import grpc
    from private.pb import ipcnodeapi_pb2 as pb
    from private.pb import ipcnodeapi_pb2_grpc as pb_grpc

    class Node(pb_grpc.IPCNodeAPIServicer):
        def ConnectionParams(self, request, context):  # noqa: N802
            return pb.ConnectionParamsResponse(dial_uri="in this process", storage_address="0x1", access_address="0x2")

        def BucketView(self, request, context):  # noqa: N802
            if request.name not in world.buckets:
                context.abort(grpc.StatusCode.NOT_FOUND, "bucket not found")
            return pb.IPCBucketViewResponse(id=BUCKET_ID.hex(), name=request.name)

        def FileView(self, request, context):  # noqa: N802
            file = world.files.get(request.file_name)
            if file is None:
                context.abort(grpc.StatusCode.NOT_FOUND, "file not found")
            return pb.IPCFileViewResponse(
                file_name=request.file_name, root_cid=file.root_cid, encoded_size=file.encoded, actual_size=file.size
            )

        def FileList(self, request, context):  # noqa: N802
            return pb.IPCFileListResponse(
                list=[
                    pb.IPCFileListResponse.IPCFile(name=name, root_cid=file.root_cid, actual_size=file.size)
                    for name, file in list(world.files.items())[: request.limit]
                ]
            )

        def FileUploadChunkCreate(self, request, context):  # noqa: N802
            chunk = request.chunk
            world.files[request.file_name].chunks.append(chunk)
            one = pb.IPCFileUploadChunkCreateResponse.BlockUpload
            return pb.IPCFileUploadChunkCreateResponse(
                blocks=[one(cid=b.cid, node_address=world.address, node_id="n" * 38) for b in chunk.blocks]
            )

        def FileUploadBlock(self, requests, context):  # noqa: N802
            cid, data = "", bytearray()
            for part in requests:
                cid = cid or part.cid
                data += part.data
            world.blocks[cid] = bytes(data)
            return pb.IPCFileUploadBlockResponse()

        def FileDownloadRangeCreate(self, request, context):  # noqa: N802
            world.ranges.append((request.start_index, request.end_index))
            chunks = world.files[request.file_name].chunks[request.start_index : request.end_index]
            one = pb.IPCFileDownloadCreateResponse.Chunk
            return pb.IPCFileDownloadCreateResponse(
                bucket_name=request.bucket_name, chunks=[one(cid=c.cid, size=c.size) for c in chunks]
            )

        def FileDownloadChunkCreate(self, request, context):  # noqa: N802
            (chunk,) = {c.cid: c for c in world.files[request.file_name].chunks if c.cid == request.chunk_cid}.values()
            one = pb.IPCFileDownloadChunkCreateResponse.BlockDownload
            return pb.IPCFileDownloadChunkCreateResponse(
                blocks=[one(cid=b.cid, node_address=world.address, node_id="n" * 38) for b in chunk.blocks]
            )

        def FileDownloadBlock(self, request, context):  # noqa: N802
            data = world.blocks[request.block_cid]
            for at in range(0, len(data), 128 * 1024):
                yield pb.IPCFileBlockData(data=data[at : at + 128 * 1024])

    server = grpc.server(ThreadPoolExecutor(16))
    pb_grpc.add_IPCNodeAPIServicer_to_server(Node(), server)
    world.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    return server


@contextmanager
def local_akave() -> Iterator[World]:
    """A node with the bucket `models`; the real SDK must be installed."""
    try:
        import akavesdk
    except ImportError as error:
        pytest.fail(f"the akavesdk is installed and cannot be imported: {error}; docs/akave.md says what it needs")
    if "stand" in (akavesdk.__doc__ or "").lower():
        pytest.fail("this is the stand-in; tests of the marker akavesdk need the real akavesdk (docs/akave.md)")
    world = World(buckets={"models"})
    server = _service(world)
    server.start()

    def dial(config: Any) -> Any:
        from eth_account import Account

        account = Account.from_key(config.private_key)
        receipt = SimpleNamespace(status=1, blockNumber=1, transactionHash=b"\x01")
        eth = SimpleNamespace(
            wait_for_transaction_receipt=lambda tx: receipt, get_block=lambda number: SimpleNamespace(timestamp=1)
        )
        return SimpleNamespace(auth=account, storage=Storage(world), eth=SimpleNamespace(eth=eth))

    patch = pytest.MonkeyPatch()
    patch.setattr(sys.modules["sdk.sdk"].Client, "dial", staticmethod(dial))
    try:
        yield world
    finally:
        patch.undo()
        server.stop(0).wait(5)
