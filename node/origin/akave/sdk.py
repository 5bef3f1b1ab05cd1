"""The public akavesdk as it really behaves. Every call blocks: the store runs them in threads.

The SDK (github.com/akave-ai/akavesdk-py, GPLv3) is not a dependency: users install it themselves (docs/akave.md). Found
by running it: the package `akavesdk` must be imported before `sdk` and `private`, which it brings; its connection pool
costs 200 ms a download; the node that it asks for its contracts is fixed; concurrent transactions of one account lose
against each other ("nonce too low"); a range consists of chunks; nothing is checked on download; a reader that fails
once is taken for one at its end; its encryption breaks uploads and is never used here.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from node.origin.akave.errors import LostTransactionError, UnexpectedAnswerError, is_nonce_race
from node.origin.akave.upload import UploadReader
from node.origin.core.credentials import Secret
from node.origin.core.fork_guard import expect_works, no_fork
from protocol.errors import OriginDeniedError, OriginError

log = logging.getLogger(__name__)

LIST_LIMIT = 1000
"""The most files that `list_files` asks for; there is no second page."""
MIN_OBJECT_BYTES = 127
FIXED_NODE = "connect.akave.ai:5500"
"""The node that the SDK asks for its contracts, whatever node it is given."""
INSTALL = "see docs/akave.md to install it, or use o3:// with --o3-backend gateway"

_BLOCK_PART_BYTES = 128 * 1024
_BLOCKS_AT_ONCE = 8
_CLOSE_S = 1.0
_TAKE_BACK_TRIES = 6
_TAKE_BACK_WAIT_S = 0.5
_PRIVATE_KEY = re.compile(r"(0x)?[0-9a-fA-F]{64}")

_writing = threading.Lock()
"""One writer at a time in a process, whatever the store: a nonce belongs to the account."""


@dataclass(frozen=True, slots=True)
class AkaveFile:
    """One file, as its node describes it."""

    name: str
    size: int
    """Plain bytes; 0 while its upload is not finished."""
    root_cid: str
    created_s: float


def sdk_is_importable() -> bool:
    """Whether the akavesdk is installed. Does not import it, which takes 1 to 2 s and 77 MiB."""
    return importlib.util.find_spec("akavesdk") is not None


def import_sdk() -> Any:
    """The module `akavesdk`. Raises OriginError that says what is missing."""
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
    """One account at one node, opened at its first use.

    Every method blocks, and raises what the SDK raises; LostTransactionError if a transaction may be sent again.
    """

    def __init__(self, *, node: str, ipc_node: str, private_key: Secret, connect_timeout_s: float) -> None:
        self._node, self._ipc_node, self._private_key = node, ipc_node, private_key
        self._connect_timeout_s = connect_timeout_s
        self._opening = threading.Lock()
        self._sdk: Any = None
        self._ipc: Any = None

    def ipc(self) -> Any:
        """The SDK's own object for its IPC calls; usable as long as this connection is open.

        Nothing guards it: its user sees to it that one transaction of the account goes on at a time.
        """
        return self._open()

    def view(self, bucket: str, name: str) -> AkaveFile | None:
        """A file; None if there is none of that name."""
        meta = self._open().file_info(None, bucket, name)
        if meta is None:
            return None
        return AkaveFile(name, int(meta.actual_size), str(meta.root_cid), _seconds(meta.created_at))

    def has_bucket(self, bucket: str) -> bool:
        """Whether the account has the bucket."""
        return self._open().view_bucket(None, bucket) is not None

    def create_bucket(self, bucket: str) -> None:
        """Create a bucket."""
        ipc = self._open()
        with _writing, _lost_transactions():
            ipc.create_bucket(None, bucket)

    def buckets(self) -> list[str]:
        """The names of the account's buckets, as many as the SDK gives at once."""
        return [str(one.name) for one in self._open().list_buckets(None)]

    def files(self, bucket: str) -> list[AkaveFile]:
        """The files of a bucket, at most LIST_LIMIT."""
        return [
            AkaveFile(str(one.name), int(one.actual_size), str(one.root_cid), _seconds(one.created_at))
            for one in self._open().list_files(None, bucket)
        ]

    def download_chunk(self, bucket: str, name: str, index: int, writer: io.RawIOBase) -> None:
        """Write one chunk, CHUNK_BYTES or the rest of the file, to `writer`. The SDK does not check its bytes.

        The SDK has all of a chunk in memory, about three times, before it writes the first byte.
        """
        ipc = self._open()
        download = ipc.create_range_file_download(None, bucket, name, index, index + 1)
        if len(download.chunks) != 1:
            raise UnexpectedAnswerError(f"chunk {index} was asked for, and {len(download.chunks)} chunks are offered")
        ipc.download(None, download, writer)

    def upload(self, bucket: str, name: str, reader: UploadReader) -> tuple[str, int]:
        """Send a file. Returns its root CID and size, as the SDK computed them. Other writes of this process wait."""
        ipc = self._open()
        while not _writing.acquire(timeout=1):
            reader.beat()
        try:
            with _lost_transactions(lambda: not reader.begun):
                meta = ipc.upload(None, bucket, name, reader)
            return str(meta.root_cid), int(meta.size)
        except Exception:
            if reader.begun:
                self._take_back(ipc, bucket, name)
            raise
        finally:
            _writing.release()

    def delete(self, bucket: str, name: str) -> None:
        """Delete a file."""
        ipc = self._open()
        with _writing, _lost_transactions():
            ipc.file_delete(None, bucket, name)

    def close(self, patience_s: float = _CLOSE_S) -> None:
        """Close the connection, which ends the calls that wait for the node. The next call opens a new one.

        A connection that is being opened, and may hang, is not waited for longer than `patience_s`.
        """
        if not self._opening.acquire(timeout=patience_s):
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
        if not _PRIVATE_KEY.fullmatch(key):  # the libraries below would quote it in their errors
            raise OriginDeniedError("AKAVE_PRIVATE_KEY is not a private key: it must have 64 hexadecimal digits")
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
        """Free the name that a broken upload of ours has taken, if the node permits it.

        Repeated here if another transaction of the account is faster: nothing above knows of it.
        """
        for tries in range(1, _TAKE_BACK_TRIES + 1):
            try:
                ipc.file_delete(None, bucket, name)
                return
            except Exception as error:
                if tries == _TAKE_BACK_TRIES or not is_nonce_race(error):
                    log.warning(
                        "the broken upload of %r to Akave's bucket %r could not be deleted (%s): delete it before its "
                        "name is used again",
                        name,
                        bucket,
                        type(error).__name__,
                    )
                    return
            time.sleep(_TAKE_BACK_WAIT_S * tries * random.uniform(0.5, 1.5))


def _contracts_of(node: str) -> dict[str, str]:
    """The contracts that a node uses. The SDK would ask FIXED_NODE."""
    fetcher = importlib.import_module("sdk.sdk").AkaveContractFetcher(node)
    try:
        info = fetcher.fetch_contract_addresses() if fetcher.connect() else None
    finally:
        fetcher.close()
    if not info or not info.get("contract_address") or not info.get("dial_uri"):
        raise ConnectionError(f"could not fetch contract information from {node}")
    return dict(info)


@contextmanager
def _lost_transactions(may_repeat: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Raises LostTransactionError if another process's transaction was faster and this one may be sent again."""
    try:
        yield
    except Exception as error:
        if is_nonce_race(error) and may_repeat():
            raise LostTransactionError(str(error)) from error
        raise


def _seconds(value: Any) -> float:
    return float(value.timestamp()) if hasattr(value, "timestamp") else float(value or 0)
