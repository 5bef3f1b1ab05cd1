"""Refuse modules that have grown past one room: 300 lines, tests and examples left out."""

from __future__ import annotations

import sys
from pathlib import Path

LIMIT = 300
ROOMS = ("protocol", "node", "torch_bridge", "scripts")


def main() -> int:
    root = Path(__file__).resolve().parent.parent.parent
    long = [
        (path.relative_to(root), lines)
        for room in ROOMS
        for path in sorted((root / room).rglob("*.py"))
        if (lines := len(path.read_text().splitlines())) > LIMIT
    ]
    for path, lines in long:
        print(f"{path}: {lines} lines, more than {LIMIT}: is it two rooms?")
    return 1 if long else 0


if __name__ == "__main__":
    sys.exit(main())
