"""The project keeps the rules of scripts/tools/check_layout.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.tools.check_layout import RULES, Project, Violation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project() -> Project:
    return Project.read(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_project_keeps_rule(rule: Callable[[Project], Iterator[Violation]], project: Project) -> None:
    assert [str(violation) for violation in rule(project)] == []


def test_whole_project_is_read(project: Project) -> None:
    read = {module.path for module in [*project.modules.values(), *project.programs, *project.tests]}
    assert {"node/node.py", "protocol/manifest.py", "torch_bridge/__init__.py", "tests/conftest.py"} <= read
    assert len(project.nouns) > 200
    assert len(project.words) >= 9
    assert "README.md" in project.prose
    assert not [path for path in project.prose if path.startswith("tests/")]
