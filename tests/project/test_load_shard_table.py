"""The table of a LOAD_SHARD in docs/architecture.md names functions that exist, in the order of `ShardFetch`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
TABLE = PAGE[PAGE.index("## A LOAD_SHARD, step by step") : PAGE.index("PROGRESS goes the other way")]
ROWS = [line.split(" | ") for line in TABLE.splitlines() if re.match(r"\| \d", line)]


def functions(path: Path) -> list[str]:
    """`function` and `Class.method` of a module, in the order of its text."""
    found: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
            found += [f"{node.name}.{method.name}" for method in methods]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(node.name)
    return found


def test_every_function_of_the_table_is_in_a_file_of_its_row() -> None:
    named: list[Path] = []
    for _, _, function_cell, file_cell in ROWS:
        files = [ROOT / name for name in re.findall(r"`(node/[\w/]+\.py)`", file_cell)]
        named = files if "the same" not in file_cell else [*named, *files]
        known = {name for path in named for name in functions(path)}
        missing = set(re.findall(r"`([\w.]+)`", function_cell)) - known
        assert not missing, f"{file_cell} has no {missing}"
    assert len(ROWS) >= 18


def test_the_fetch_is_written_in_the_order_of_the_table() -> None:
    steps = [name for row in ROWS for name in re.findall(r"`(ShardFetch\.\w+)`", row[2])]
    written = functions(ROOT / "node" / "shards" / "fetch" / "download.py")
    assert steps == sorted(steps, key=written.index)
    names = [step.partition(".")[2] for step in steps]
    assert names == ["run", "locate", "reserve", "providers", "download", "check", "adopt", "announce"]
