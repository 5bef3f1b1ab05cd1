"""One argument that says where shards come from."""

from __future__ import annotations

import re
from pathlib import Path

from node.origin.layout import is_address
from protocol.errors import InvalidParamsError
from torch_bridge.core.client import O3Client
from torch_bridge.shards.sources.interface import ShardSource
from torch_bridge.shards.sources.local import LocalSource
from torch_bridge.shards.sources.node import NodeSource
from torch_bridge.shards.sources.origin import OriginSource

_NODE = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):\d{1,5}")


def open_source(
    where: str | Path, dataset: str | None = None, *, folder: Path | str | None = None, client: O3Client | None = None
) -> ShardSource:
    """A node ("127.0.0.1:7400", with `dataset`), an origin ("o3://bucket/prefix" with `dataset`, or a manifest's URL;
    with the `folder` that shards go to), or a folder that holds the shards already.

    Raises InvalidParamsError if `folder` or `dataset` is needed and missing, or `where` is none of these.
    """
    text = str(where)
    if is_address(text):
        if folder is None:
            raise InvalidParamsError(f"shards from {text} need a folder: give folder=")
        return OriginSource(text, folder, dataset=dataset, client=client)
    if _NODE.fullmatch(text) and not Path(text).is_dir():
        if dataset is None:
            raise InvalidParamsError(f"the node at {text} is asked for a data set: give dataset=")
        return NodeSource(text, dataset, folder=folder)
    if not Path(text).is_dir():
        raise InvalidParamsError(f"{text} is neither a node's HOST:PORT, nor an origin's URL, nor a folder here")
    return LocalSource(Path(text))
