"""Buckets: create, list, delete, for an operator or a check. Nothing else creates one.

A call to the gateway is sent once. Natively, transactions that lose a race of the account are repeated.
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
"""Stands for no bucket, in calls that are about none."""
_AWS_DEFAULT_REGION = "us-east-1"


def open_account(settings: OriginSettings) -> AkaveStore:
    """The account of the private key, natively. Raises OriginError if there is no SDK, OriginDeniedError if no key."""
    return open_akave_store(OriginUrl.parse(f"akave://{ANY}"), settings)


async def create_bucket(scheme: Scheme, name: str, settings: OriginSettings) -> bool:
    """Create a bucket; False if this account has it already. Raises OriginExistsError if another account has it."""
    url = OriginUrl.parse(f"{scheme}://{name}")
    if goes_native(url, settings):
        async with _closing(open_akave_store(url, settings)) as store:
            return await store.create_bucket()
    if name in await list_buckets(scheme, settings):
        return False
    async with _client(url, settings) as client:
        await client.call("create_bucket", "create the bucket", name, _region(url, settings))
    return True


async def list_buckets(scheme: Scheme, settings: OriginSettings) -> list[str]:
    """The names of this account's buckets, sorted."""
    url = OriginUrl.parse(f"{scheme}://{ANY}")
    if goes_native(url, settings):
        async with _closing(open_account(settings)) as store:
            return sorted(await store.buckets())
    async with _client(url, settings) as client:
        answer = await client.call("list_buckets", "list buckets", "", {}, in_bucket=False)
    return sorted(str(one["Name"]) for one in answer.get("Buckets") or [])


async def delete_bucket(scheme: Scheme, name: str, settings: OriginSettings) -> None:
    """Delete an empty bucket; succeeds if there is none. Raises OriginError natively: the SDK's call is not used."""
    url = OriginUrl.parse(f"{scheme}://{name}")
    if goes_native(url, settings):
        found, advice = "this cannot be done natively", "delete it with Akave's own tools"
        raise origin_error(OriginError, "delete the bucket", found, advice, origin=str(url), key="")
    async with _client(url, settings) as client:
        try:
            await client.call("delete_bucket", "delete the bucket", name, {})
        except OriginNotFoundError:
            return


def _region(url: OriginUrl, settings: OriginSettings) -> dict[str, Any]:
    """Amazon's region of a new bucket; other servers get none."""
    if url.scheme == "o3" or settings.s3_endpoint is not None or settings.s3_region == _AWS_DEFAULT_REGION:
        return {}
    return {"CreateBucketConfiguration": {"LocationConstraint": settings.s3_region}}


@asynccontextmanager
async def _client(url: OriginUrl, settings: OriginSettings) -> AsyncIterator[S3ApiClient]:
    access = S3Access.of(url, settings)
    origin = f"{url.scheme}://" if url.container == ANY else str(url)
    async with S3ApiClient(access, S3ErrorTranslator(origin, access.credentials_from)) as client:
        yield client


@asynccontextmanager
async def _closing(store: AkaveStore) -> AsyncIterator[AkaveStore]:
    try:
        yield store
    finally:
        await store.close()
