"""What this machine gives: memory and cores, as the kernel and a container's limits let a process have them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping: the machine's, or less if a cgroup (v2) has a limit.

    File pages count as free in both: the kernel gives them up for whoever needs memory, and a node that has read
    many shards has many of them.
    """
    available = int(psutil.virtual_memory().available)
    for folder in _cgroups():
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None:
            available = min(available, max(0, limit - used + _file_pages(folder)))
    return available


def total_memory_bytes() -> int:
    """Memory of the machine, or the limit of the cgroup if that is less."""
    limits = [_number(folder / "memory.max") for folder in _cgroups()]
    return min([int(psutil.virtual_memory().total), *(limit for limit in limits if limit is not None)])


def process_memory_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if sys.platform == "linux":
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _cgroups() -> list[Path]:
    """The folders of this process's cgroup and of those around it (v2); a limit may stand in any of them."""
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    folder = _CGROUPS / own if ".." not in own else _CGROUPS
    return [folder, *(above for above in folder.parents if above.is_relative_to(_CGROUPS))]


def _number(path: Path) -> int | None:
    """None if there is no such file, or it says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _file_pages(folder: Path) -> int:
    """Bytes of files that the kernel keeps in memory for this cgroup (memory.stat; no shared memory among them)."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    counts = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
