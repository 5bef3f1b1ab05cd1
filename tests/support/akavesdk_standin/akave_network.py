"""STAND-IN of what the akavesdk talks to: nodes by their addresses, in memory. Tests look at it and disturb it."""

import threading
import time
from dataclasses import dataclass, field

CHUNK = 32_000_000

nodes = {}
contracts_asked_of = []


class RpcError(Exception):
    """As gRPC's: the status is behind `code()`."""

    def __init__(self, name, details):
        super().__init__(f"<_InactiveRpcError of RPC that terminated with: status = StatusCode.{name}>")
        self._name, self._details = name, details

    def code(self):
        return type("StatusCode", (), {"name": self._name})

    def details(self):
        return self._details


@dataclass
class File:
    chunks: list
    root_cid: str = ""
    created_at: int = 1_700_000_000

    @property
    def size(self):
        return sum(len(chunk) for chunk in self.chunks) if self.root_cid else 0


@dataclass
class Node:
    address: str
    buckets: dict = field(default_factory=dict)
    opened: int = 0
    calls: list = field(default_factory=list)
    chunks_sent: list = field(default_factory=list)
    """(name, index) of every chunk that was downloaded."""
    most_at_once: int = 0
    pooled: int = 0
    """Downloads that paid for the connection pool."""
    down: list = field(default_factory=list)
    """gRPC statuses that the next calls end with."""
    says: str = ""
    """What the next calls fail with, if anything."""
    hang: threading.Event | None = None
    """Calls wait for it."""
    nonce: int = 0
    nonce_losses: int = 0
    foreign_transactions: int = 0
    """How many of the next transactions lose against another process of the account."""
    fail_chunk: int | None = None
    """Uploads fail at this chunk."""
    wrong_root_cid: str = ""
    refuse_deletes: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _now: int = 0

    def call(self, name):
        self.calls.append(name)
        if self.hang is not None:
            self.hang.wait(20)
        if self.says:
            raise ValueError(self.says)
        if self.down:
            status = self.down.pop(0)
            raise RpcError(status, f"details of {status}")

    def transaction(self):
        with self._lock:
            nonce = self.nonce
        time.sleep(0.02)
        with self._lock:
            if self.foreign_transactions:
                self.foreign_transactions -= 1
                self.nonce += 1
            if nonce != self.nonce:
                self.nonce_losses += 1
                raise ValueError({"code": -32000, "message": "nonce too low: next nonce 7, tx nonce 6"})
            self.nonce += 1

    def entered(self, step):
        with self._lock:
            self._now += step
            self.most_at_once = max(self.most_at_once, self._now)

    def corrupt(self, bucket, name, chunk, offset):
        chunks = self.buckets[bucket][name].chunks
        data = bytearray(chunks[chunk])
        data[offset] ^= 1
        chunks[chunk] = bytes(data)
