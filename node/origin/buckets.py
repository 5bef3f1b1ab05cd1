"""Buckets themselves: made, listed and taken away, by hand or by a check. Nothing else here makes one. Each call is
tried once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

from node.origin.akave.store import AkaveStore, open_akave_store
from node.origin.core.errors import origin_error
from node.origin.factory import goes_native
from node.origin.s3.access import S3Access
from node.origin.s3.botocore_client import S3ApiClient
from node.origin.s3.errors import S3ErrorTranslator
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from protocol.errors import OriginError, OriginNotFoundError

Scheme = Literal["o3", "s3", "akave"]
ANY = "any"
"""Names no bucket: for calls that are about none."""
_AWS_DEFAULT_REGION = "us-east-1"


def open_account(settings: OriginSettings) -> AkaveStore:
    """The native way to the account of the private key. Raises OriginError where there is no SDK or no key."""
    return open_akave_store(OriginUrl.parse(f"akave://{ANY}"), settings)


async def create_bucket(scheme: Scheme, name: str, settings: OriginSettings) -> bool:
    """Make a bucket; False where this account has it already. Raises OriginExistsError where another has it."""
    url = OriginUrl.parse(f"{scheme}://{name}")
    if goes_native(url, settings):
        async with _closing(open_akave_store(url, settings)) as store:
            return await store.create_bucket()
    if name in await list_buckets(scheme, settings):
        return False
    async with _calls(url, settings) as calls:
        await calls.call("create_bucket", "create the bucket", name, _place(url, settings))
    return True


async def list_buckets(scheme: Scheme, settings: OriginSettings) -> list[str]:
    """The names of this account's buckets, in order."""
    url = OriginUrl.parse(f"{scheme}://{ANY}")
    if goes_native(url, settings):
        async with _closing(open_account(settings)) as store:
            return sorted(await store.buckets())
    async with _calls(url, settings) as calls:
        answer = await calls.call("list_buckets", "list buckets", "", {}, in_bucket=False)
    return sorted(str(one["Name"]) for one in answer.get("Buckets") or [])


async def delete_bucket(scheme: Scheme, name: str, settings: OriginSettings) -> None:
    """Take an empty bucket away. Raises OriginError natively: the SDK's way to it was never tried here."""
    url = OriginUrl.parse(f"{scheme}://{name}")
    if goes_native(url, settings):
        found, advice = "natively there is no way to it here", "delete it by Akave's own tools"
        raise origin_error(OriginError, "delete the bucket", found, advice, origin=str(url), key="")
    async with _calls(url, settings) as calls:
        try:
            await calls.call("delete_bucket", "delete the bucket", name, {})
        except OriginNotFoundError:
            return


def _place(url: OriginUrl, settings: OriginSettings) -> dict[str, Any]:
    """Where Amazon shall put a bucket; no other server is told."""
    if url.scheme == "o3" or settings.s3_endpoint is not None or settings.s3_region == _AWS_DEFAULT_REGION:
        return {}
    return {"CreateBucketConfiguration": {"LocationConstraint": settings.s3_region}}


@asynccontextmanager
async def _calls(url: OriginUrl, settings: OriginSettings) -> AsyncIterator[S3ApiClient]:
    access = S3Access.of(url, settings)
    origin = f"{url.scheme}://" if url.container == ANY else str(url)
    async with S3ApiClient(access, S3ErrorTranslator(origin, access.credentials_from)) as calls:
        yield calls


@asynccontextmanager
async def _closing(store: AkaveStore) -> AsyncIterator[AkaveStore]:
    try:
        yield store
    finally:
        await store.close()
