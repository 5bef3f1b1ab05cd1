"""`demo`: three nodes on this machine, one real model, one generation, checked against one process; then an origin.

command    what happens in which order
nodes      node processes: start, ready, stop
view       what a person sees
s3_server  SeaweedFS, started and always ended
origin     the seed is gone: the origin gives the shard
reference  the same generation by one process over the whole model
"""

from node.cli.demo.command import EXAMPLES, demo

__all__ = ["EXAMPLES", "demo"]
