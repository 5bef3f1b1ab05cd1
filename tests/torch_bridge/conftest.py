"""One S3 server for all tests of torch_bridge that only need to have one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from node.cli.demo.s3_server import S3Server
from tests.support.origins.s3_server import s3_server


@pytest.fixture(scope="session")
def shared_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module")
def module_s3(shared_s3: S3Server, request: pytest.FixtureRequest) -> S3Server:
    """The server, with a prefix of the module's own as its bucket."""
    return replace(shared_s3, bucket=f"{shared_s3.bucket}/{request.module.__name__.replace('.', '-')}")
