"""What a machine's own tools ask a node over HTTP: `/healthz` and `/metrics`.

server   the aiohttp application
metrics  a node's STATUS as Prometheus metrics
"""

from node.http.metrics import render_metrics
from node.http.server import HttpServer

__all__ = ["HttpServer", "render_metrics"]
