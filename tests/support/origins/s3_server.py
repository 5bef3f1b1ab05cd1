"""A real S3 server for tests that are not asynchronous, and command lines typed with its credentials."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

from node.cli.demo.s3_server import S3Server, running_s3
from node.origin.core.credentials import Credentials
from node.origin.settings import OriginSettings
from tests.support.daemons import shoal

START_S = 40.0


@contextlib.contextmanager
def s3_server(
    folder: Path, *, access_key: str = "access-of-the-tests", secret_key: str = "not-so-secret-key-of-the-tests"
) -> Iterator[S3Server]:
    """Run SeaweedFS in an event loop of its own; its thread lives as long as it, since the server ends with it."""
    found: list[S3Server] = []
    ready, done = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with running_s3(folder, access_key=access_key, secret_key=secret_key) as server:
            found.append(server)
            ready.set()
            await done.wait()

    def run() -> None:
        try:
            loop.run_until_complete(serve())
        finally:
            ready.set()
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(START_S)
        assert found, "the S3 server did not start"
        yield found[0]
    finally:
        if found:
            loop.call_soon_threadsafe(done.set)
        thread.join(START_S)


def credentials(server: S3Server, *, secret_key: str | None = None) -> dict[str, str]:
    """The environment that makes o3:// and s3:// mean this server."""
    secret = server.secret_key if secret_key is None else secret_key
    return {
        "AKAVE_O3_ACCESS_KEY": server.access_key,
        "AKAVE_O3_SECRET_KEY": secret,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "SHOAL_O3_ENDPOINT": server.endpoint,
        "SHOAL_S3_ENDPOINT": server.endpoint,
    }


def settings(server: S3Server, *origins: str) -> OriginSettings:
    environment = credentials(server)
    return OriginSettings(
        origins=origins,
        o3_endpoint=server.endpoint,
        s3_endpoint=server.endpoint,
        credentials=Credentials.from_environment(environment),
    )


def typed(environment: Mapping[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command line in this process, with these variables of the environment."""
    with mock.patch.dict(os.environ, environment):
        return shoal(*map(str, arguments))
