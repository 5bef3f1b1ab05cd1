"""On a machine where a node cannot run, it is refused with a reason, and the client commands work."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from node.cli.serve import check_platform
from protocol.errors import UnsupportedPlatformError

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import sys
for name in ("libtorrent", "tensor_iroh", "xllamacpp", "torch"):
    sys.modules[name] = None
from node.cli import main
main()
"""


def test_without_the_native_libraries_a_client_says_what_it_found() -> None:
    typed = [sys.executable, "-c", WITHOUT, "call", "127.0.0.1:1", "STATUS"]
    done = subprocess.run(typed, capture_output=True, text=True, timeout=40, cwd=ROOT)
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "unreachable"


@pytest.mark.parametrize(
    ("machine", "libc"), [("aarch64", ("glibc", "2.36")), ("x86_64", ("glibc", "2.31")), ("x86_64", ("", ""))]
)
def test_another_machine_or_an_older_libc_is_refused_in_words(
    machine: str, libc: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    with pytest.raises(UnsupportedPlatformError, match=machine) as caught:
        check_platform()
    assert "glibc 2.34" in caught.value.message


def test_one_module_alone_opens_the_library_of_llama_cpp() -> None:
    """import-linter cannot see it: the library is opened by its file, not imported."""
    opens = re.compile(r"CDLL\((?!None)")
    found = [str(p.relative_to(ROOT / "node")) for p in (ROOT / "node").rglob("*.py") if opens.search(p.read_text())]
    assert found == ["pipeline/engine/llama.py"]
