"""The public akavesdk, as it really behaves. Everything here blocks: it runs in threads (akave_threads.py).

The SDK (github.com/akave-ai/akavesdk-py, GPLv3) is no dependency: users install it themselves (docs/akave.md). What was
found by running it: the package `akavesdk` must be imported before `sdk` and `private`, which it brings; its connection
pool costs 200 ms a download; the node that it asks for its contracts is fixed; concurrent transactions of one account
lose against each other ("nonce too low"); a range is of chunks; nothing is checked on download; a reader that fails is
taken for one at its end if it fails once only; its encryption breaks uploads and is never used here.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from node.origin.akave.errors import UnexpectedAnswerError, is_nonce_race
from node.origin.akave.upload import UploadReader
from node.origin.core.credentials import Secret
from node.origin.core.fork_guard import expect_works, no_fork
from protocol.errors import OriginDeniedError, OriginError

log = logging.getLogger(__name__)
T = TypeVar("T")

LIST_LIMIT = 1000
"""What `list_files` asks for; there is no second page."""
MIN_OBJECT_BYTES = 127
FIXED_NODE = "connect.akave.ai:5500"
"""Where the SDK looks for its contracts, whatever node it is told to use."""
INSTALL = "docs/akave.md says how to install it; without it there is o3:// with --o3-backend gateway"

_BLOCK_PART_BYTES = 128 * 1024
_BLOCKS_AT_ONCE = 8
_CLOSE_S = 1.0
_NONCE_TRIES = 6
_NONCE_WAIT_S = 0.5
_PRIVATE_KEY = re.compile(r"(0x)?[0-9a-fA-F]{64}")

_writing = threading.Lock()
"""One writer at a time in a process, whatever the store: nonces are the account's."""


@dataclass(frozen=True, slots=True)
class AkaveFile:
    """One file, as its node describes it."""

    name: str
    size: int
    """Plain bytes; 0 while its upload is not finished."""
    root_cid: str
    created_s: float


def sdk_is_importable() -> bool:
    """Whether the akavesdk is installed. Imports nothing: that takes 1 to 2 s and 77 MiB."""
    return importlib.util.find_spec("akavesdk") is not None


def import_sdk() -> Any:
    """The module `akavesdk`. Raises OriginError with what is missing."""
    if "akavesdk" not in sys.modules:
        for taken in ("sdk", "private"):
            if taken in sys.modules:
                raise OriginError(
                    f"another Python module called {taken!r} is loaded in this process, and the akavesdk brings one of "
                    "that name; run the node in an environment without the other one"
                )
    try:
        return importlib.import_module("akavesdk")
    except Exception as error:
        raise OriginError(f"the akavesdk cannot be imported: {str(error)[:300]}; {INSTALL}") from error


class AkaveConnection:
    """One account at one node, opened at its first use. Every method blocks and raises what the SDK raises."""

    def __init__(self, *, node: str, ipc_node: str, private_key: Secret, connect_timeout_s: float) -> None:
        self._node, self._ipc_node, self._private_key = node, ipc_node, private_key
        self._connect_timeout_s = connect_timeout_s
        self._opening = threading.Lock()
        self._sdk: Any = None
        self._ipc: Any = None

    def ipc(self) -> Any:
        """The SDK's own object for its IPC calls, as long as this connection is open. Nothing guards it: one writer at
        a time, whatever it is.
        """
        return self._open()

    def view(self, bucket: str, name: str) -> AkaveFile | None:
        """None where there is no such file."""
        meta = self._open().file_info(None, bucket, name)
        if meta is None:
            return None
        return AkaveFile(name, int(meta.actual_size), str(meta.root_cid), _seconds(meta.created_at))

    def has_bucket(self, bucket: str) -> bool:
        return self._open().view_bucket(None, bucket) is not None

    def create_bucket(self, bucket: str) -> None:
        ipc = self._open()
        with _writing:
            _transact(lambda: ipc.create_bucket(None, bucket), lambda: True)

    def buckets(self) -> list[str]:
        """Names, as many as the SDK gives at once."""
        return [str(one.name) for one in self._open().list_buckets(None)]

    def files(self, bucket: str) -> list[AkaveFile]:
        """All of a bucket, LIST_LIMIT of them at most."""
        return [
            AkaveFile(str(one.name), int(one.actual_size), str(one.root_cid), _seconds(one.created_at))
            for one in self._open().list_files(None, bucket)
        ]

    def download_chunk(self, bucket: str, name: str, index: int, writer: io.RawIOBase) -> None:
        """Write one chunk, of CHUNK_BYTES or what is left of the file. Nothing has been checked of its bytes.

        The SDK has all of a chunk in memory, about three times, before it writes the first byte.
        """
        ipc = self._open()
        download = ipc.create_range_file_download(None, bucket, name, index, index + 1)
        if len(download.chunks) != 1:
            raise UnexpectedAnswerError(f"chunk {index} was asked for, and {len(download.chunks)} chunks are offered")
        ipc.download(None, download, writer)

    def upload(self, bucket: str, name: str, reader: UploadReader) -> tuple[str, int]:
        """Send a file; its root CID and size as the SDK computed them. Other writes of this process wait."""
        ipc = self._open()
        while not _writing.acquire(timeout=1):
            reader.beat()
        try:
            meta = _transact(lambda: ipc.upload(None, bucket, name, reader), lambda: not reader.begun)
            return str(meta.root_cid), int(meta.size)
        except Exception:
            if reader.begun:
                self._take_back(ipc, bucket, name)
            raise
        finally:
            _writing.release()

    def delete(self, bucket: str, name: str) -> None:
        ipc = self._open()
        with _writing:
            _transact(lambda: ipc.file_delete(None, bucket, name), lambda: True)

    def close(self) -> None:
        """Ends the calls that wait at the node itself. The next call opens a new connection.

        One that is being opened, and may hang, is not waited for: nothing waits behind it but itself.
        """
        if not self._opening.acquire(timeout=_CLOSE_S):
            return
        try:
            sdk, self._sdk, self._ipc = self._sdk, None, None
        finally:
            self._opening.release()
        if sdk is not None:
            sdk.close()

    def _open(self) -> Any:
        with self._opening:
            if self._ipc is None:
                self._sdk, self._ipc = self._connected()
            return self._ipc

    def _connected(self) -> tuple[Any, Any]:
        expect_works("akavesdk", f"akave://{self._node}")
        key = self._private_key.reveal()
        if not _PRIVATE_KEY.fullmatch(key):  # else libraries below quote it in their errors
            raise OriginDeniedError("AKAVE_PRIVATE_KEY is no private key: 64 hexadecimal digits are expected")
        with no_fork():
            akavesdk = import_sdk()
        config = akavesdk.SDKConfig(
            address=self._node,
            max_concurrency=_BLOCKS_AT_ONCE,
            block_part_size=_BLOCK_PART_BYTES,
            use_connection_pool=False,
            private_key=key,
            connection_timeout=max(1, round(self._connect_timeout_s)),
            ipc_address=self._ipc_node,
        )
        sdk = akavesdk.SDK(config)
        try:
            if self._ipc_node != FIXED_NODE:
                sdk._contract_info = _contracts_of(self._ipc_node)
            return sdk, sdk.ipc()
        except BaseException:
            sdk.close()
            raise

    def _take_back(self, ipc: Any, bucket: str, name: str) -> None:
        """Free a name that an upload of ours has taken and not filled, if the node lets us."""
        try:
            _transact(lambda: ipc.file_delete(None, bucket, name), lambda: True)
        except Exception as error:
            log.warning(
                "what was uploaded of %r to Akave's bucket %r could not be deleted (%s): delete it before its name can "
                "be used again",
                name,
                bucket,
                type(error).__name__,
            )


def _contracts_of(node: str) -> dict[str, str]:
    """The contracts that a node works with. The SDK would ask FIXED_NODE."""
    fetcher = importlib.import_module("sdk.sdk").AkaveContractFetcher(node)
    try:
        info = fetcher.fetch_contract_addresses() if fetcher.connect() else None
    finally:
        fetcher.close()
    if not info or not info.get("contract_address") or not info.get("dial_uri"):
        raise ConnectionError(f"could not fetch contract information from {node}")
    return dict(info)


def _transact(call: Callable[[], T], may_repeat: Callable[[], bool]) -> T:
    """Call again while another transaction of the account, of another process, was faster."""
    tries = 0
    while True:
        try:
            return call()
        except Exception as error:
            tries += 1
            if tries == _NONCE_TRIES or not is_nonce_race(error) or not may_repeat():
                raise
        time.sleep(_NONCE_WAIT_S * tries * random.uniform(0.5, 1.5))


def _seconds(value: Any) -> float:
    return float(value.timestamp()) if hasattr(value, "timestamp") else float(value or 0)
