"""docs/operating.md has every setting, metric and error code of the code, and no other."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from pydantic import ByteSize, TypeAdapter

from node.cli.serve import serve
from node.config import Settings
from node.http.metrics import render_metrics
from node.origin.settings import O3_ENDPOINT, O3_REGION, OriginSettings
from protocol import errors
from protocol.commands.nodes import DhtStatus, StatusResult, SwarmStatus, TransportStatus
from protocol.commands.shards import FileInfo
from protocol.ids import NodeId

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "operating.md").read_text()
FLAGS = {"origins": "origin", "manifests": "manifest"}
"""Given once for each of several."""
IN_WORDS = {
    "data_dir": "the user's data folder",
    "shards_dir": "DATA_DIR/shards",
    "threads": "the usable cores",
    "advertise": "listen",
    "o3_endpoint": O3_ENDPOINT,
    "o3_region": O3_REGION,
    "s3_endpoint": "Amazon's",
    "akave_node": OriginSettings.akave_node,
    "akave_ipc": "the node's",
    "origin_key_file": "none",
}


def _rows(section: str) -> list[list[str]]:
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_every_setting_stands_there_with_its_flag_and_variable() -> None:
    rows = _rows("Settings")
    names = [row[0].strip("`") for row in rows]
    assert names == [name for name in Settings.model_fields if name != "config"]
    assert {*names, "config"} == set(inspect.signature(serve).parameters)
    for name, row in zip(names, rows, strict=True):
        assert row[1] == f"`--{FLAGS.get(name, name.replace('_', '-'))}`"
        assert row[2] == f"`SHOAL_{name.upper()}`"


@pytest.mark.parametrize(("name", "shown"), [(row[0].strip("`"), row[3].strip("`")) for row in _rows("Settings")])
def test_defaults_are_those_of_the_code(name: str, shown: str) -> None:
    default = Settings.model_fields[name].default
    if name in IN_WORDS:
        assert shown == IN_WORDS[name]
    elif isinstance(default, ByteSize):
        assert TypeAdapter(ByteSize).validate_python(shown) == default
    else:
        assert shown == {"()": "none", "True": "true", "False": "false"}.get(str(default), str(default))


def test_every_metric_stands_there() -> None:
    status = StatusResult(
        node_id=NodeId("0" * 64),
        cluster="c",
        uptime_s=0.0,
        versions={},
        memory={},
        threads=1,
        stages=[],
        downloads=[],
        swarm=SwarmStatus(uploaded_bytes=0, downloaded_bytes=0, peers=0, torrents=0),
        dht=DhtStatus(nodes=0, records=0),
        transport=TransportStatus(),
    )
    text = render_metrics(status, [FileInfo(filename="f", size=1, kind="gguf", state="seeding")]).decode()
    given = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    told = {re.match(r"`(\w+)", row[0])[1]: row[1] for row in _rows("/healthz and /metrics")}  # type: ignore[index]
    assert told == given


def test_every_error_code_has_a_line() -> None:
    codes = {kind.code for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, Exception)}
    told = {code for row in _rows("When something is wrong") for code in re.findall(r"`(\w+)`", row[0])}
    assert told == codes
