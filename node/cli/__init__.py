"""What a person types: `shoal COMMAND`, or `python -m node COMMAND`.

app       the commands, and `serve` as the default one
options   the settings as options, made from node/config.py
serve     the daemon
split     cut a model into shards
publish   put files where the daemon shares them, and at origins
pull      have a model or data set on a node's disk
shards    files, unpin, evict: what lies on a node's disk
verify    every copy against the manifest
remote    call, nodes, status, generate: one RPC each
check_o3  whether credentials, bucket and endpoint of O3 work
demo      three nodes, one model, one generation
console   how all of them print
"""

from __future__ import annotations

import sys

from node.cli.app import run


def main(argv: list[str] | None = None) -> None:
    """Entry point of `shoal` and of `python -m node`."""
    run(sys.argv[1:] if argv is None else argv)


__all__ = ["main"]
