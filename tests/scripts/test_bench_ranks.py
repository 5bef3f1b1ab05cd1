"""scripts.bench.ranks: what it counts, and a small run of it with real nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.bench.ranks.report import Outcome, Samples, table, tally, verdict

ROOT = Path(__file__).resolve().parents[2]


def outcome(what: str, origin_bytes: int, samples: Samples) -> Outcome:
    return Outcome(what, 2, samples, 3.0, 1.0, origin_bytes, peer_bytes=100, most_on_disk=50)


def test_samples_that_are_lost_and_doubled_are_counted() -> None:
    assert tally([np.array([3, 0]), np.array([1, 2])], 4) == Samples(4, missing=0, twice=0)
    assert tally([np.array([0, 1]), np.array([1])], 4) == Samples(3, missing=2, twice=1)
    assert tally([], 4) == Samples(0, missing=4, twice=0)
    assert not tally([np.array([0, 1, 2, 4])], 3).right, "the data set has no sample 4"


def test_the_goal_is_of_the_rows_with_a_node_each() -> None:
    right, wrong = Samples(10, 0, 0), Samples(9, 1, 0)
    nodes, plain = outcome("node each", 109, right), outcome("origin each", 200, right)
    assert verdict([nodes, plain], 100) == (
        "With a node each the origin sent at most 1.090 times the data (goal 1.1: reached). Each sample came once."
    )
    assert "(goal 1.1: missed)" in verdict([outcome("node each", 111, right)], 100)
    assert verdict([plain], 100).startswith("The goal was not measured.")
    assert verdict([outcome("one node", 100, wrong)], 100).endswith("Samples were lost or doubled: one node, N=2")
    assert "| node each | 2 | 1.090 | 1.00 | 10 | 0 | 0 | 1.0 | 3.0 | 0.50 |" in table([nodes], 100)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_two_ranks_with_a_node_each_take_the_data_once(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "scripts.bench.ranks",
        "--quick",
        "--rows",
        "node each",
        "one node",
        "--json",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    each, one = found["rows"]
    for row in (each, one):
        assert row["samples"] == {"seen": found["samples"], "missing": 0, "twice": 0}
        assert row["origin_bytes"] < 1.5 * found["size"], "of so few blocks, some may be taken twice"
    assert each["peer_bytes"] > 0.3 * found["size"], "nodes pass on what they have"
    assert one["peer_bytes"] == 0
