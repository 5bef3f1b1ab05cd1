"""Threads that first decode into a type at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from protocol.structs import prepared

PROCESSES = 10
"""About every second one ends with a segmentation fault if the type is not prepared."""
PROGRAM = """
import sys, threading
from protocol.errors import InvalidManifestError
from protocol.manifest import manifest_from_wire

def decode():
    together.wait()
    try:
        manifest_from_wire({"manifest": {}})
    except InvalidManifestError as err:
        refused.append(err)

sys.setswitchinterval(1e-6)
together, refused = threading.Barrier(8), []
threads = [threading.Thread(target=decode) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(refused))
"""


def test_threads_may_read_the_first_manifests_at_once() -> None:
    for _ in range(PROCESSES):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr


def test_a_type_that_cannot_be_decoded_is_refused() -> None:
    with pytest.raises(TypeError, match="more than one"):
        prepared(int | list[int] | tuple[str, ...])
