"""Memory as a container's limits let a process have it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from node import machine

MB = 1 << 20


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The process is in `outer/inner`; no limit yet."""
    (tmp_path / "own").write_text("1:name=systemd:/elsewhere\n0::/outer/inner\n")
    root = tmp_path / "cgroup"
    (root / "outer" / "inner").mkdir(parents=True)
    monkeypatch.setattr(machine, "_CGROUPS", root)
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "own")
    return root


def write(folder: Path, limit: str, used: int, inactive_file: int = 0, active_file: int = 0) -> None:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    stat = f"anon 5\nfile 7\ninactive_file {inactive_file}\nactive_file {active_file}\nshmem 3\n"
    (folder / "memory.stat").write_text(stat)


def test_without_a_limit_it_is_the_machines(cgroups: Path) -> None:
    assert machine.total_memory_bytes() == psutil.virtual_memory().total
    write(cgroups / "outer", "max", 3 * MB)
    assert machine.total_memory_bytes() == psutil.virtual_memory().total
    assert machine.available_memory_bytes() > 64 * MB


def test_the_smallest_limit_around_the_process_counts(cgroups: Path) -> None:
    write(cgroups / "outer" / "inner", str(64 * MB), 10 * MB)
    write(cgroups / "outer", str(32 * MB), 12 * MB)
    assert machine.total_memory_bytes() == 32 * MB
    assert machine.available_memory_bytes() == 20 * MB


def test_pages_of_files_that_were_read_are_free(cgroups: Path) -> None:
    """Or a node that has hashed and seeded its shards would refuse to load one."""
    write(cgroups / "outer", str(64 * MB), 60 * MB, inactive_file=30 * MB, active_file=20 * MB)
    assert machine.available_memory_bytes() == 54 * MB


def test_more_than_the_limit_is_none_left(cgroups: Path) -> None:
    write(cgroups / "outer", str(64 * MB), 70 * MB)
    assert machine.available_memory_bytes() == 0


def test_elsewhere_there_are_no_cgroups(cgroups: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_OWN_CGROUP", tmp_path / "no such file")
    assert machine.available_memory_bytes() > 64 * MB


def test_this_process_has_memory_and_cores() -> None:
    assert machine.process_memory_bytes() > MB
    assert machine.usable_cores() >= 1
