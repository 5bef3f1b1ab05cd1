"""STAND-IN: see akavesdk/__init__.py."""

from dataclasses import dataclass

import akave_network

from .sdk_ipc import IPC, SDKError


@dataclass
class SDKConfig:
    address: str
    max_concurrency: int
    block_part_size: int
    use_connection_pool: bool
    parity_blocks_count: int = 0
    chunk_buffer: int = 10
    encryption_key: bytes | None = None
    private_key: str | None = None
    streaming_max_blocks_in_chunk: int = 32
    connection_timeout: int | None = 30
    max_retries: int | None = 3
    backoff_delay: int | None = 1
    ipc_address: str | None = None


class AkaveContractFetcher:
    def __init__(self, node_address):
        self.node_address = node_address

    def connect(self):
        return True

    def fetch_contract_addresses(self):
        akave_network.contracts_asked_of.append(self.node_address)
        if self.node_address not in akave_network.nodes:
            return None
        return {"dial_uri": f"chain of {self.node_address}", "contract_address": "0x1", "access_address": "0x2"}

    def close(self):
        pass


class SDK:
    def __init__(self, config):
        if not 0 < config.block_part_size <= 1_000_000:
            raise SDKError(f"Invalid blockPartSize: {config.block_part_size}")
        self.config = config
        self.closed = False
        self._contract_info = None

    def ipc(self):
        if not self._contract_info:
            self._contract_info = AkaveContractFetcher("connect.akave.ai:5500").fetch_contract_addresses()
        if not self._contract_info:
            raise SDKError("Failed to initialize IPC API: Could not fetch contract information from any Akave node")
        if not self.config.private_key:
            raise SDKError("Failed to initialize IPC API: Private key is required for IPC operations")
        node = akave_network.nodes.get(self.config.ipc_address or self.config.address)
        if node is None or self._contract_info["dial_uri"] != f"chain of {node.address}":
            raise SDKError("Failed to initialize IPC API: Failed to dial IPC client after 3 attempts: no such chain")
        node.opened += 1
        return IPC(node, self.config, self)

    def close(self):
        self.closed = True
