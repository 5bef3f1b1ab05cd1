"""The S3 server that tests share, with a prefix for each module."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.cli.demo.s3_server import S3Server


@pytest.fixture(scope="module")
def module_s3(shared_s3: S3Server, request: pytest.FixtureRequest) -> S3Server:
    """The server, with a prefix of the module's own as its bucket."""
    return replace(shared_s3, bucket=f"{shared_s3.bucket}/{request.module.__name__.replace('.', '-')}")
