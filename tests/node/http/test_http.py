"""/healthz and /metrics over a real socket."""

from __future__ import annotations

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from node.http import HttpServer, render_metrics
from protocol.commands.nodes import DhtStatus, StatusResult, SwarmStatus, TransportStatus
from protocol.commands.shards import FileInfo
from protocol.ids import NodeId

STATUS = StatusResult(
    node_id=NodeId("ab" * 32),
    cluster="default",
    uptime_s=12.5,
    versions={"shoal": "0.1.0"},
    memory={"total_bytes": 2, "available_bytes": 1, "process_bytes": 1},
    threads=2,
    stages=[],
    downloads=[],
    swarm=SwarmStatus(uploaded_bytes=7, downloaded_bytes=9, peers=3, torrents=4),
    dht=DhtStatus(nodes=5, records=6),
    transport=TransportStatus(),
)
FILES = [
    FileInfo(filename=f"{i}", size=1, kind="gguf", state=state)
    for i, state in enumerate(["seeding", "seeding", "invalid"])
]


async def test_health_and_metrics() -> None:
    async def metrics() -> bytes:
        return render_metrics(STATUS, FILES)

    async with (
        HttpServer.serve("127.0.0.1", 0, health=lambda: {"status": "ok"}, metrics=metrics) as server,
        aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as http,
    ):
        async with http.get("/healthz") as answer:
            assert answer.status == 200
            assert await answer.json() == {"status": "ok"}
        async with http.get("/metrics") as answer:
            assert answer.content_type == "text/plain"
            text = await answer.text()
        async with http.get("/nothing") as answer:
            assert answer.status == 404
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["shoal_swarm_uploaded_bytes_total",] == 7
    assert samples["shoal_swarm_peers",] == 3
    assert samples["shoal_dht_records",] == 6
    assert samples["shoal_shards", "seeding"] == 2
    assert samples["shoal_shards", "invalid"] == 1
