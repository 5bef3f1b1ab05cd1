"""`check-o3`: whether these credentials reach O3, and whether it does what a node needs, step by step."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

import typer

from node.cli.console import examples, fail, out, print_json
from node.cli.options import ConfigFile, Json, option
from node.config import load_settings
from node.origin.buckets import create_bucket, delete_bucket, list_buckets
from node.origin.factory import goes_native, open_store
from node.origin.interface import ObjectStore
from node.origin.settings import OriginSettings, origin_settings
from node.origin.url import OriginUrl
from protocol.errors import (
    InvalidParamsError,
    OriginDeniedError,
    OriginError,
    OriginExistsError,
    OriginNotFoundError,
    OriginUnavailableError,
    ShoalError,
)

EXAMPLES = examples(
    "shoal check-o3",
    "shoal check-o3 --bucket my-data",
    "shoal check-o3 --o3-endpoint https://o3.example.org",
    "shoal check-o3 --o3-backend native",
    "shoal check-o3 --json | jq .ok",
)
OBJECT_BYTES = 300_000
RANGE = (12_345, 212_345)
CONNECT_S, READ_S = 5.0, 30.0


@dataclass(frozen=True)
class CheckStep:
    """One line of the result."""

    name: str
    result: Literal["ok", "failed", "skipped"]
    """skipped: what it needs has failed."""
    ms: float = 0.0
    found: str = ""
    hint: str = ""


def check_o3(
    *,
    bucket: Annotated[
        str | None, typer.Option(metavar="NAME", help="The bucket to check in. Default: a new one, deleted at the end.")
    ] = None,
    keep_bucket: Annotated[bool, typer.Option("--keep-bucket", help="Leave a bucket that this made.")] = False,
    config: ConfigFile = None,
    o3_endpoint: Annotated[str | None, option("o3_endpoint", also="--endpoint")] = None,
    o3_backend: Annotated[str | None, option("o3_backend", also="--backend")] = None,
    patience: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="For retries of one step on an object.")
    ] = 10.0,
    json_output: Json = False,
) -> None:
    """Check that O3 works with these credentials.

    Makes a bucket, or takes the named one; writes an object, reads a range of it, deletes it; each step is shown with
    its time, and a hint if it fails. The object is always deleted, the bucket if this made it; natively a bucket
    stays. Credentials come from the environment: AKAVE_O3_ACCESS_KEY and AKAVE_O3_SECRET_KEY, natively
    AKAVE_PRIVATE_KEY, or files named by those with _FILE. They are never printed. Exit status 1 if a step failed, 2 if
    it could not begin.
    """
    configured = load_settings(config=config, o3_endpoint=o3_endpoint, o3_backend=o3_backend)
    try:
        settings = replace(
            origin_settings(configured),
            connect_timeout_s=CONNECT_S,
            read_timeout_s=READ_S,
            retry_total_s=patience,
            encryption_key_file=None,
        )
        check = Check(settings, bucket, (lambda _: None) if json_output else _show)
    except ShoalError as error:
        fail(error.message, code=2)
    endpoint = settings.akave_node if check.native else settings.o3_endpoint
    if not json_output:
        how = "natively" if check.native else "by its gateway"
        out.print(f"O3 {how} at {endpoint}, bucket {check.bucket}", markup=False, soft_wrap=True)
    asyncio.run(check.run(keep_bucket=keep_bucket))
    if json_output:
        about = {"ok": check.ok, "endpoint": endpoint, "native": check.native, "bucket": check.bucket}
        print_json(about | {"steps": [asdict(step) for step in check.steps]})
    else:
        count = {result: sum(step.result == result for step in check.steps) for result in ("failed", "skipped")}
        out.print("all is well" if check.ok else f"{count['failed']} failed, {count['skipped']} skipped")
    if not check.ok:
        raise typer.Exit(1)


class Check:
    """The steps, in order; each is shown as soon as it is known. Raises ShoalError for settings that cannot be."""

    def __init__(self, settings: OriginSettings, bucket: str | None, show: Callable[[CheckStep], None]) -> None:
        self.steps: list[CheckStep] = []
        self._settings, self._show = settings, show
        self._named = bucket is not None
        self.bucket = bucket or f"shoal-check-{secrets.token_hex(4)}"
        self._url = OriginUrl.parse(f"o3://{self.bucket}/shoal-check")
        self.native = goes_native(self._url, settings)
        self._made = False

    @property
    def ok(self) -> bool:
        """Whether no step failed or was skipped."""
        return all(step.result == "ok" for step in self.steps)

    async def run(self, *, keep_bucket: bool) -> None:
        """All steps. What was made is taken away whatever fails, an interruption too."""
        listed = await self._step("credentials", self._credentials)
        try:
            there = await self._step("bucket create", self._create, after=listed)
            await self._step("bucket list", self._list, after=there)
            # A key may be good for one bucket alone, and not for a list of all.
            await self._objects(after=there or self._named)
        finally:
            if self._made and not keep_bucket:
                await self._step("bucket delete", self._delete_bucket)

    async def _objects(self, *, after: bool) -> None:
        key, body = f"{secrets.token_hex(8)}.bin", os.urandom(OBJECT_BYTES)
        put = False
        store: ObjectStore | None = None

        async def write() -> str:
            nonlocal store
            store = open_store(self._url, self._settings)
            return _size((await store.put(key, body, if_absent=True)).size)

        try:
            put = await self._step("put", write, after=after)
            await self._step("ranged get", lambda: _ranged(store, key, body), after=put)
            await self._step("head", lambda: _head(store, key), after=put)
        finally:
            deleted = await self._step("delete", lambda: _deleted(store, key), after=put)
            if store is not None:
                if not deleted:
                    with suppress(ShoalError):  # it may have been written all the same
                        await store.delete(key)
                await store.close()

    async def _step(self, name: str, do: Callable[[], Awaitable[str]], *, after: bool = True) -> bool:
        if not after:
            return self._told(CheckStep(name, "skipped", found="what it needs has failed"))
        started = time.monotonic()
        try:
            found = await do()
        except ShoalError as error:
            return self._told(CheckStep(name, "failed", _ms(started), error.message, hint(name, error)))
        return self._told(CheckStep(name, "ok", _ms(started), found))

    def _told(self, step: CheckStep) -> bool:
        self.steps.append(step)
        self._show(step)
        return step.result == "ok"

    async def _credentials(self) -> str:
        keys = self._settings.credentials
        if not (self.native or keys.o3_access_key or keys.o3_secret_key):
            raise OriginDeniedError("AKAVE_O3_ACCESS_KEY and AKAVE_O3_SECRET_KEY are not set: there are no credentials")
        count = len(await list_buckets("o3", self._settings))
        return f"accepted; {count} bucket{'' if count == 1 else 's'}"

    async def _create(self) -> str:
        self._made = await create_bucket("o3", self.bucket, self._settings)
        return f"{self.bucket} {'made' if self._made else 'was there before'}"

    async def _list(self) -> str:
        if self.bucket not in (found := await list_buckets("o3", self._settings)):
            raise OriginError(f"{self.bucket} is not among the {len(found)} buckets that are listed")
        return f"{self.bucket} is listed"

    async def _delete_bucket(self) -> str:
        if self.native:
            return f"{self.bucket} is left: natively there is no way to delete it here"
        await delete_bucket("o3", self.bucket, self._settings)
        return f"{self.bucket} deleted"


def _ms(started_s: float) -> float:
    return round((time.monotonic() - started_s) * 1e3, 1)


def _size(size: int) -> str:
    return f"{size:,} bytes"


async def _ranged(store: ObjectStore | None, key: str, body: bytes) -> str:
    assert store is not None
    if await store.get_range(key, *RANGE) != body[slice(*RANGE)]:
        raise OriginError(f"bytes {RANGE[0]} to {RANGE[1]} came, and are not those that were written")
    return f"bytes {RANGE[0]:,} to {RANGE[1]:,}, the same as written"


async def _head(store: ObjectStore | None, key: str) -> str:
    assert store is not None
    info = await store.head(key)
    if info.size != OBJECT_BYTES:
        raise OriginError(f"it says {info.size} bytes, and {OBJECT_BYTES} were written")
    state = f", on Akave's network: {info.network_state}" if info.network_state else ""
    return _size(info.size) + state


async def _deleted(store: ObjectStore | None, key: str) -> str:
    assert store is not None
    await store.delete(key)
    async for _ in store.list(key):
        return "asked for; it is still listed"
    return "gone"


def hint(step: str, error: ShoalError) -> str:
    """What to look at, beyond what the error says."""
    text = error.message
    match error:
        case OriginDeniedError() if "SignatureDoesNotMatch" in text:
            return "the access key is known, its secret key is another one: was it cut or quoted when it was copied?"
        case OriginDeniedError() if "InvalidAccessKeyId" in text:
            return (
                "this endpoint does not know the access key: a credential is of one gateway, and --o3-endpoint names it"
            )
        case OriginDeniedError() if step == "bucket create":
            return "the key may not make or list buckets: name one that it may use by --bucket"
        case OriginDeniedError() if "403" in text or "401" in text:
            return "the key is wrong, has expired, or may not do this: look at it where it was issued"
        case OriginDeniedError() | InvalidParamsError():
            return "set the variables, or put the secrets into files and name those by the same variables with _FILE"
        case OriginUnavailableError() if "refused" in text or "name is not known" in text:
            return (
                "nothing answers at this endpoint: is it spelt as your credential's page has it? a proxy, a firewall?"
            )
        case OriginUnavailableError():
            return "the gateway answers badly or not in time: try again in some minutes"
        case OriginExistsError() if step == "bucket create":
            return "somebody else has a bucket of that name: give another --bucket"
        case OriginNotFoundError():
            return "the bucket is not there: without --bucket the check makes one"
        case OriginError() if step == "bucket delete":
            return "it may not be empty: look into it, and delete it by hand"
        case OriginError() if "akavesdk" in text:
            return "docs/akave.md says how to install the akavesdk; --o3-backend gateway needs none"
    return "look at the endpoint and its certificate; docs/akave.md has more"


def _show(step: CheckStep) -> None:
    ms = f"{step.ms:7.0f} ms" if step.result != "skipped" else " " * 10
    shown = f"{step.result.upper() if step.result == 'failed' else step.result:8}{step.name:15}{ms}   {step.found}"
    out.print(shown + (f"\n{'':8}hint: {step.hint}" if step.hint else ""), markup=False, soft_wrap=True)
