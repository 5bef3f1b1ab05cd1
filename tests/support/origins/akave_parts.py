"""The labelled stand-in of the akavesdk (tests/support/akavesdk_standin), in place of the real one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from node.origin.akave.sdk import sdk_is_importable
from node.origin.akave.store import AkaveStore, open_akave_store
from node.origin.core.credentials import Credentials, Secret
from node.origin.settings import OriginSettings
from node.origin.url import OriginUrl
from tests.support.clocks import LeapingClock

STANDIN = Path(__file__).parents[1] / "akavesdk_standin"
PRIVATE_KEY = "0x" + "5e" * 16 + "C7" * 16
NODE = "node.test:5500"
BUCKET = "models"
_PACKAGES = ("akavesdk", "sdk", "private", "akave_network")


def loaded() -> list[str]:
    """Modules of an akavesdk in this process."""
    return [name for name in sys.modules if name.split(".")[0] in _PACKAGES]


def without_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the length of a test no akavesdk is installed, though this environment may have the real one."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not (Path(folder) / "akavesdk").exists()])
    importlib.invalidate_caches()


def expect_real_sdk(items: Sequence[pytest.Item]) -> None:
    """Raises pytest.UsageError, which ends the run, if tests of the marker `akavesdk` are to run without the SDK."""
    count = sum(item.get_closest_marker("akavesdk") is not None for item in items)
    if count and not sdk_is_importable():
        raise pytest.UsageError(
            f"{count} tests of the marker akavesdk need the real akavesdk, and it is not installed in {sys.prefix}: "
            "docs/akave.md says how to install it"
        )


@contextmanager
def standin_network() -> Iterator[Any]:
    """The stand-in's module `akave_network`, with one node at NODE that has the bucket BUCKET."""
    assert not loaded(), "an akavesdk is loaded already: the stand-in cannot take its place"
    sys.path.insert(0, str(STANDIN))
    importlib.invalidate_caches()
    try:
        network = importlib.import_module("akave_network")
        network.nodes[NODE] = network.Node(NODE, {BUCKET: {}})
        yield network
    finally:
        sys.path.remove(str(STANDIN))
        for name in loaded():
            del sys.modules[name]
        importlib.invalidate_caches()


def settings(**changed: Any) -> OriginSettings:
    return OriginSettings(
        **{
            "akave_node": NODE,
            "credentials": Credentials(akave_private_key=Secret(PRIVATE_KEY)),
            "retry_total_s": 5.0,
            **changed,
        }
    )


def akave_store(url: str = f"akave://{BUCKET}/smol", **changed: Any) -> AkaveStore:
    """A store whose waits before a retry take no time."""
    return open_akave_store(OriginUrl.parse(url), settings(**changed), LeapingClock())
