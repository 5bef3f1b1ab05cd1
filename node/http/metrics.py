"""A node's STATUS as Prometheus metrics: the same figures, for a machine that watches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from protocol.commands.nodes import StatusResult
from protocol.commands.shards import FileInfo


def render_metrics(status: StatusResult, files: Iterable[FileInfo]) -> bytes:
    """Prometheus text format 0.0.4 of one moment."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(status, files))
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, status: StatusResult, files: Iterable[FileInfo]) -> None:
        self._status = status
        self._files = tuple(files)

    def collect(self) -> Iterable[Metric]:
        status = self._status
        info = GaugeMetricFamily("shoal_node", "Always 1.", labels=["node_id", "cluster", "version"])
        info.add_metric([status.node_id, status.cluster, status.versions.get("shoal", "")], 1)
        yield info
        yield GaugeMetricFamily("shoal_uptime_seconds", "Since the node started.", value=status.uptime_s)
        yield GaugeMetricFamily(
            "shoal_memory_available_bytes", "Of the machine.", value=status.memory.get("available_bytes", 0)
        )
        yield GaugeMetricFamily(
            "shoal_process_memory_bytes", "Resident, of the daemon.", value=status.memory.get("process_bytes", 0)
        )
        shards = GaugeMetricFamily("shoal_shards", "Shard files by state.", labels=["state"])
        for state, count in Counter(file.state for file in self._files).items():
            shards.add_metric([state], count)
        yield shards
        yield GaugeMetricFamily("shoal_downloads", "Downloads in progress.", value=len(status.downloads))
        swarm = status.swarm
        yield CounterMetricFamily("shoal_swarm_uploaded_bytes", "BitTorrent payload.", value=swarm.uploaded_bytes)
        yield CounterMetricFamily("shoal_swarm_downloaded_bytes", "BitTorrent payload.", value=swarm.downloaded_bytes)
        yield GaugeMetricFamily("shoal_swarm_peers", "BitTorrent peers connected.", value=swarm.peers)
        yield GaugeMetricFamily("shoal_swarm_torrents", "Torrents seeded or downloaded.", value=swarm.torrents)
        yield GaugeMetricFamily("shoal_dht_nodes", "Nodes in the routing table.", value=status.dht.nodes)
        yield GaugeMetricFamily("shoal_dht_records", "Valid records kept.", value=status.dht.records)
        origin = status.origin
        yield CounterMetricFamily("shoal_origin_downloaded_bytes", "From origins.", value=origin.downloaded_bytes)
        yield CounterMetricFamily("shoal_origin_requests", "Asked of origins.", value=origin.requests)
        yield CounterMetricFamily("shoal_origin_errors", "Requests to origins that failed.", value=origin.errors)
        yield GaugeMetricFamily("shoal_stages", "Engine processes.", value=len(status.stages))
        yield GaugeMetricFamily(
            "shoal_sessions", "Sessions open on this node's stages.", value=sum(s.sessions for s in status.stages)
        )
        yield CounterMetricFamily(
            "shoal_forward_seconds", "Spent in forwards.", value=sum(s.forward_s for s in status.stages)
        )
        yield CounterMetricFamily("shoal_forwards", "Batches run.", value=sum(s.forwards for s in status.stages))
        transport = status.transport
        yield CounterMetricFamily("shoal_transport_sent_bytes", "Activations.", value=transport.sent_bytes)
        yield CounterMetricFamily("shoal_transport_received_bytes", "Activations.", value=transport.received_bytes)
        yield CounterMetricFamily(
            "shoal_transport_dropped_frames", "Frames without the session's key.", value=transport.dropped_frames
        )
