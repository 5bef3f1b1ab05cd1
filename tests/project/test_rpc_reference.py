"""docs/rpc.md and docs/formats.md say what the declarations say: their tables, and every example."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from protocol.commands.common import Envelope, decode_params
from protocol.errors import error_from_wire

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "write_rpc_reference", ROOT / "scripts" / "tools" / "write_rpc_reference.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "rpc.md").read_text()


def test_the_tables_are_what_is_declared(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_table_and_a_missing_command_are_noticed(
    script: ModuleType, page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(script, "PAGES", (script.RPC_PAGE,))
    copy = tmp_path / script.RPC_PAGE

    copy.write_text(page.replace("| `wait` | bool | true |", "| `wait` | bool | false |", 1))
    assert script.main(["--check"]) == 1
    assert script.main([]) == 0
    assert copy.read_text() == page

    copy.write_text(page.replace("<!-- generated: command CANCEL -->", "", 1))
    assert script.main(["--check"]) == 1


def _decode(script: ModuleType, method: str, params: dict[str, Any]) -> None:
    if method == "EXECUTE_TASK":
        rest = dict(params)
        decode_params(script.task_types()[rest.pop("task_type")][0], rest)
    else:
        decode_params(script.commands()[method][0], params)


def test_every_raw_example_is_valid(script: ModuleType, page: str) -> None:
    methods: dict[int, tuple[str, dict[str, Any]]] = {}
    seen = set()
    for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL):
        match json.loads(text):
            case [0, int(msgid), str(method), list(values)]:
                params, envelope = [*values, {}, {}][:2]
                _decode(script, method, params)
                decode_params(Envelope, envelope)
                methods[msgid] = method, params
                seen.add(method)
            case [1, int(msgid), None, result]:
                method, params = methods[msgid]
                exchange = script.task_types()[params["task_type"]] if "task_type" in params else None
                msgspec.convert(result, (exchange or script.commands()[method])[1])
            case [1, int(), error, None]:
                assert error_from_wire(error).to_wire() == error
            case [2, str(method), [params]]:
                msgspec.convert(params, script.notifications()[method])
            case other:
                pytest.fail(f"no MessagePack-RPC: {other}")
    assert seen == set(script.commands()) - {"OPEN_SESSION"}  # its key is bin, which JSON has not


def test_every_command_line_example_is_valid(script: ModuleType, page: str) -> None:
    found = re.findall(r"^    shoal call \S+ ([A-Z_]+)(?: '(.*?)')?$", page, re.DOTALL | re.MULTILINE)
    assert len(found) >= len(script.commands()) - 3
    for method, parameters in found:
        _decode(script, method, json.loads(parameters or "{}"))


def test_the_shortest_request_is_as_printed(page: str) -> None:
    import msgpack

    printed = re.search(r"`((?:[0-9a-f]{2} ){5,}[0-9a-f]{2})`", page)
    assert printed
    assert msgpack.unpackb(bytes.fromhex(printed[1])) == [0, 1, "STATUS", []]
