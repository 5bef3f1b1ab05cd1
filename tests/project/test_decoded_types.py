"""Every type that msgspec decodes into is prepared: see protocol/structs.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.tools.check_layout import Module, Project

TYPE_AT = {"msgspec.convert": 1, "msgspec.json.Decoder": 0, "msgspec.msgpack.Decoder": 0}
"""Which argument is the type."""
DECODE = ("msgspec.json.decode", "msgspec.msgpack.decode")
WITHOUT_FIELDS = ("bool", "int", "str")


def unprepared(module: Module) -> Iterator[str]:
    for node in module.nodes:
        if not isinstance(node, ast.Call) or (called := ast.unparse(node.func)) not in (*TYPE_AT, *DECODE):
            continue
        kinds = [keyword.value for keyword in node.keywords if keyword.arg == "type"]
        if called in TYPE_AT:
            kinds += node.args[TYPE_AT[called] : TYPE_AT[called] + 1]
        for kind in map(ast.unparse, kinds):
            if not kind.startswith("prepared(") and kind not in WITHOUT_FIELDS:
                yield f"{module.path}:{node.lineno} decodes into {kind}: write prepared({kind})"


def test_all_of_the_project() -> None:
    project = Project.read(Path(__file__).parents[2])
    found = {name: list(unprepared(module)) for name, module in project.modules.items()}
    assert len(found.pop("protocol.structs")) == 1
    assert [line for lines in found.values() for line in lines] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("msgspec.convert(value, Manifest)", ["decodes into Manifest"]),
        ("msgspec.json.decode(data, type=list[Manifest])", ["decodes into list[Manifest]"]),
        ("msgspec.msgpack.Decoder(Manifest)", ["decodes into Manifest"]),
        ("msgspec.convert(first(a, b), prepared(Manifest)), msgspec.json.decode(data), msgspec.convert(a, int)", []),
    ],
)
def test_what_is_found(text: str, found: list[str]) -> None:
    lines = list(unprepared(Module("m", "m.py", text)))
    assert [line.partition(" ")[2].partition(":")[0] for line in lines] == found
