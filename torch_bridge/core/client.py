"""O3Client: how a training script reaches Akave O3, or any other origin of Shoal's."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

from node.origin import buckets
from node.origin.akave.store import AkaveStore
from node.origin.core.credentials import Secret
from node.origin.settings import Backend, OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import InvalidParamsError
from torch_bridge.core.location import StoreLocation, with_secrets
from torch_bridge.core.loop_thread import loop_thread
from torch_bridge.core.retry import RetryPolicy
from torch_bridge.core.store import Store

T = TypeVar("T")


class O3Client:
    """Session, credentials and retries. Nothing is opened before the first call, and each process opens its own, so
    DataLoader workers, forked or spawned, can use a client. Pickles hold no secrets: a spawned worker reads them from
    the environment that it inherits, and says which variables are missing.

    client = O3Client()                                   # keys from AKAVE_O3_ACCESS_KEY and AKAVE_O3_SECRET_KEY
    bucket = client.bucket("my-bucket", "train")          # blocking calls; bucket.aio for async code
    bucket.put("a.bin", b"...")
    anything = client.at("hf://datasets/owner/name")      # every URL that an origin may have

    `endpoint` is the gateway's; a credential may belong to another one than the default. `access_key` and `secret_key`
    have precedence over the environment, in this process and in those forked from it. With backend "native" akavesdk
    reaches the bucket, and `private_key` (or AKAVE_PRIVATE_KEY) signs. `scheme` "s3" means any S3 server, with AWS_*
    credentials.
    """

    def __init__(
        self,
        *,
        endpoint: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        private_key: str | None = None,
        backend: Backend = "auto",
        scheme: buckets.Scheme = "o3",
        retry: RetryPolicy | None = None,
        encryption_key_file: Path | None = None,
        settings: OriginSettings | None = None,
    ) -> None:
        """`settings` replaces everything that is read from the environment."""
        if bool(access_key) != bool(secret_key):
            raise InvalidParamsError("access_key and secret_key go together: give both, or set both in the environment")
        given = settings or OriginSettings.from_environment()
        keys: dict[str, Secret] = {}
        if access_key and secret_key:
            keys = {f"{'s3' if scheme == 's3' else 'o3'}_access_key": Secret(access_key)}
            keys |= {f"{'s3' if scheme == 's3' else 'o3'}_secret_key": Secret(secret_key)}
        if private_key:
            keys["akave_private_key"] = Secret(private_key)
        changes: dict[str, Any] = {"credentials": replace(given.credentials, **keys), "o3_backend": backend}
        if endpoint is not None:
            changes["s3_endpoint" if scheme == "s3" else "o3_endpoint"] = endpoint.rstrip("/")
        if encryption_key_file is not None:
            changes["encryption_key_file"] = encryption_key_file
        self.scheme = scheme
        self.settings = replace(given, **changes)
        self.retry = retry or RetryPolicy()
        self._stores: dict[str, Store] = {}
        self._native: tuple[int, AkaveStore] | None = None

    def bucket(self, name: str, prefix: str = "") -> Store:
        """A bucket, or a part of it: keys are relative to the prefix."""
        return self.at(f"{self.scheme}://{name}/{quote(prefix.strip('/'))}")

    def at(self, url: str) -> Store:
        """Any origin: o3://, akave://, s3://, https://, hf://, file://. Raises InvalidParamsError for another URL."""
        known = str(OriginUrl.parse(url))
        if known not in self._stores:
            self._stores.setdefault(known, Store(StoreLocation(known, self.settings, self.retry)))
        return self._stores[known]

    def create_bucket(self, name: str) -> bool:
        """Create a bucket. Returns False if this account has it already. Natively it costs a transaction.

        Raises OriginExistsError if another account has it.
        """
        return self._run(lambda settings: buckets.create_bucket(self.scheme, name, settings))

    def list_buckets(self) -> list[str]:
        """The names of this account's buckets, in order."""
        return self._run(lambda settings: buckets.list_buckets(self.scheme, settings))

    def delete_bucket(self, name: str) -> None:
        """Delete an empty bucket; does nothing if there is none. Raises OriginError natively."""
        self._run(lambda settings: buckets.delete_bucket(self.scheme, name, settings))

    def ipc(self) -> Any:
        """The akavesdk's own IPC object, connected with AKAVE_PRIVATE_KEY, whatever the backend; its calls block.

        It has the SDK's faults: its ranges are of chunks, nothing that it downloads is checked, and two writers of one
        account at a time fail (docs/akave.md). Valid in this process until `close`.
        Raises OriginError if the SDK is not installed, OriginDeniedError if there is no key.
        """
        return loop_thread().run(self.retry.run(lambda _: self._account().ipc()))

    def close(self) -> None:
        """Close this process's connections; the next call opens them again."""
        for store in list(self._stores.values()):
            store.close()
        account, self._native = self._native, None
        if account is not None and account[0] == os.getpid():
            loop_thread().end(account[1].close())

    def _account(self) -> AkaveStore:
        if self._native is None or self._native[0] != os.getpid():
            self._native = os.getpid(), buckets.open_account(with_secrets(self.settings, "akave"))
        return self._native[1]

    def _run(self, ask: Callable[[OriginSettings], Coroutine[Any, Any, T]]) -> T:
        settings = with_secrets(self.settings, self.scheme)
        return loop_thread().run(self.retry.run(lambda _: ask(settings)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"scheme": self.scheme, "settings": self.settings, "retry": self.retry}  # without its secrets

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _stores={}, _native=None)
