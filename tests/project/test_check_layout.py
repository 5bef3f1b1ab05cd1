"""Each rule of scripts/tools/check_layout.py fails on a small tree that breaks it, and on no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.tools import check_layout
from scripts.tools.check_layout import Project

GLOSSARY = "| term | meaning |\n| --- | --- |\n" + "".join(
    f"| {noun} | a noun |\n"
    for noun in ("protocol", "node", "shard", "store", "settings", "catalog", "piece layer", "entry", "program")
)
MAP = '"""What a shard is.\n\ncatalog      files\nsettings     bounds\npiece_layer  hashes\n"""\n'
SHARDS = {
    "node/__init__.py": '"""Nodes.\n\nshards   files\n"""\n',
    "node/shards/__init__.py": MAP,
    "node/shards/catalog.py": '"""Files."""\n',
    "node/shards/settings.py": '"""Bounds."""\n',
    "node/shards/piece_layer.py": '"""Hashes."""\n',
    "docs/glossary.md": GLOSSARY,
}

Tree = Callable[..., Project]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """The small tree, with some of its files replaced, others added."""

    def write(changes: dict[str, str] | None = None) -> Project:
        for name, text in (SHARDS | (changes or {})).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Project.read(tmp_path)

    return write


def violations(project: Project) -> list[str]:
    return [f"{found.rule} {found.path}" for rule in check_layout.RULES for found in rule(project)]


def test_small_tree_keeps_all_rules(tree: Tree) -> None:
    assert violations(tree()) == []


def module(lines: int, docstring: str = "Files.") -> str:
    return f'"""{docstring}"""\n' + "x = 1\n" * (lines - 1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (module(500), []),
        (module(501), ["module-size node/shards/catalog.py"]),
        (module(300, ""), []),
        (module(301, ""), ["module-idea node/shards/catalog.py"]),
        (module(301, "Files, and what becomes"), ["module-idea node/shards/catalog.py"]),
        (module(301, "Files. Hashes of them."), ["module-idea node/shards/catalog.py"]),
    ],
)
def test_module_is_bounded_and_a_long_one_says_its_idea(tree: Tree, text: str, found: list[str]) -> None:
    assert violations(tree({"node/shards/catalog.py": text})) == found


def test_program_is_bounded_too(tree: Tree) -> None:
    assert violations(tree({"scripts/program.py": module(501)})) == ["module-size scripts/program.py"]


def test_short_module_with_one_importer_is_part_of_it(tree: Tree) -> None:
    importing = '"""Files."""\nfrom node.shards import piece_layer\n'
    assert violations(tree({"node/shards/catalog.py": importing})) == ["scrap node/shards/piece_layer.py"]


@pytest.mark.parametrize(
    "changes",
    [
        {"node/shards/catalog.py": '"""Files."""\nfrom node.shards.settings import x\n'},
        {
            "node/shards/catalog.py": '"""Files."""\nfrom node.shards.piece_layer import x\n',
            "node/shards/settings.py": '"""Bounds."""\nfrom node.shards.piece_layer import x\n',
        },
        {
            "node/shards/catalog.py": '"""Files."""\nfrom node.shards.piece_layer import x\n',
            "node/shards/piece_layer.py": module(60),
        },
    ],
    ids=["settings", "two importers", "60 lines"],
)
def test_module_that_is_no_scrap(tree: Tree, changes: dict[str, str]) -> None:
    assert violations(tree(changes)) == []


def package(count: int) -> dict[str, str]:
    names = ["_".join(["entry"] * number) for number in range(1, count + 1)]
    text = "\n".join(f"{name}   a file" for name in names)
    files = {f"node/store/{name}.py": '"""A file."""\n' for name in names}
    return files | {
        "node/store/__init__.py": f'"""Files.\n\n{text}\n"""\n',
        "node/__init__.py": '"""Nodes.\n\nshards  files\nstore   files\n"""\n',
    }


@pytest.mark.parametrize(("count", "kept"), [(2, False), (3, True), (14, True), (15, False)])
def test_package_has_3_to_14_modules(tree: Tree, count: int, kept: bool) -> None:
    assert violations(tree(package(count))) == ([] if kept else ["package-size node/store/__init__.py"])


def test_package_may_have_sub_packages_alone(tree: Tree) -> None:
    inner = '"""Files.\n\nentry          a file\nentry_entry    a file\nentry_program  a file\n"""\n'
    files = {
        f"node/store/{name}/{stem}.py": inner if stem == "__init__" else '"""A file."""\n'
        for name in ("entry", "catalog")
        for stem in ("__init__", "entry", "entry_entry", "entry_program")
    }
    both = files | {
        "node/__init__.py": '"""Nodes.\n\nshards  files\nstore   files\n"""\n',
        "node/store/__init__.py": '"""Files.\n\nentry, catalog   files\n"""\n',
    }
    assert violations(tree(both)) == []


@pytest.mark.parametrize(
    "lines",
    ["catalog   files\nsettings   bounds", "catalog   files\nsettings   bounds\npiece_layer   hashes\nstore   gone"],
    ids=["one is missing", "one is gone"],
)
def test_map_names_the_modules_that_there_are(tree: Tree, lines: str) -> None:
    changed = {"node/shards/__init__.py": f'"""What a shard is.\n\n{lines}\n"""\n'}
    assert violations(tree(changed)) == ["package-map node/shards/__init__.py"]


@pytest.mark.parametrize(("name", "kept"), [("entries", True), ("stores", True), ("piece", True), ("taking", False)])
def test_module_names_are_nouns_of_the_glossary(tree: Tree, name: str, kept: bool) -> None:
    changed = {
        f"node/shards/{name}.py": '"""A file."""\n',
        "node/shards/__init__.py": MAP.replace("hashes", f"hashes\n{name}   a file"),
    }
    assert violations(tree(changed)) == ([] if kept else [f"module-name node/shards/{name}.py"])


def test_class_name_is_used_once(tree: Tree) -> None:
    twice = {
        "node/shards/catalog.py": '"""Files."""\nclass File: ...\nclass _Own: ...\n',
        "node/shards/piece_layer.py": '"""Hashes."""\nclass File: ...\nclass _Own: ...\n',
    }
    assert violations(tree(twice)) == ["class-name node/shards/piece_layer.py"]


@pytest.mark.parametrize("name", ["FileManager", "FileHelper", "BaseFile", "FileBase", "FileImpl"])
def test_class_name_says_what_the_class_is(tree: Tree, name: str) -> None:
    changed = {"node/shards/catalog.py": f'"""Files."""\nclass {name}: ...\n'}
    assert violations(tree(changed)) == ["class-name node/shards/catalog.py"]


READER = """
from typing import Protocol
class Reader(Protocol):
    size: int
    def read(self) -> bytes: ...
"""
BY_NAME = "class DiskFile:\n    def __init__(self):\n        self.size = 1\n    def read(self): ...\n"
BY_BASE = "class WebFile(Reader):\n    ...\n"


@pytest.mark.parametrize(
    ("code", "double", "kept"),
    [
        ("", "", False),
        (BY_NAME, "", False),
        (BY_NAME + BY_BASE, "", True),
        (BY_NAME, "class Double(DiskFile): ...\n", True),
        (BY_NAME, "class Double:\n    def read(self): ...\n", False),
    ],
    ids=["none", "one", "by name and by base", "a test's, inherited", "a test's without a member"],
)
def test_interface_has_two_implementations(tree: Tree, code: str, double: str, kept: bool) -> None:
    changed = {"node/shards/catalog.py": f'"""Files."""{READER}{code}', "tests/test_reader.py": double}
    assert violations(tree(changed)) == ([] if kept else ["protocol-use node/shards/catalog.py"])


def test_signature_of_a_function_needs_no_implementation(tree: Tree) -> None:
    code = "from typing import Protocol\nclass Read(Protocol):\n    def __call__(self) -> bytes: ...\n"
    assert violations(tree({"node/shards/catalog.py": f'"""Files."""\n{code}'})) == []


def test_asyncio_protocol_is_no_interface(tree: Tree) -> None:
    code = "import asyncio\nclass Datagrams(asyncio.Protocol): ...\n"
    assert violations(tree({"node/shards/catalog.py": f'"""Files."""\n{code}'})) == []


def test_interface_is_not_named_like_a_class(tree: Tree) -> None:
    changed = {
        "node/shards/catalog.py": f'"""Files."""{READER}{BY_NAME}{BY_BASE}',
        "node/shards/piece_layer.py": '"""Hashes."""\nclass Reader: ...\n',
    }
    assert violations(tree(changed)) == [
        "class-name node/shards/piece_layer.py",
        "protocol-name node/shards/catalog.py",
    ]


def constructor(collaborators: int, values: int) -> str:
    acting = [f"a{number}: Acting{number % 2} | None" for number in range(collaborators)]
    still = [f"v{number}: Value" for number in range(values)] + ["text: str"]
    return f"""'''Files.'''
from dataclasses import dataclass
class Acting0: ...
class Acting1: ...
@dataclass(frozen=True)
class Value:
    size: int
class File:
    def __init__(self, {", ".join(acting + still)}) -> None: ...
"""


@pytest.mark.parametrize(("collaborators", "values", "kept"), [(7, 9, True), (8, 0, False)])
def test_constructor_takes_seven_collaborators(tree: Tree, collaborators: int, values: int, kept: bool) -> None:
    changed = {"node/shards/catalog.py": constructor(collaborators, values)}
    assert violations(tree(changed)) == ([] if kept else ["constructor node/shards/catalog.py"])


@pytest.mark.parametrize(("decorator", "kept"), [("@dataclass", False), ("@dataclass(frozen=True)", True)])
def test_dataclass_counts_by_its_fields_unless_it_is_a_value(tree: Tree, decorator: str, kept: bool) -> None:
    fields = "".join(f"    f{number}: Callable[[File], None]\n" for number in range(8))
    code = f"'''Files.'''\n{decorator}\nclass File:\n{fields}"
    assert violations(tree({"node/shards/catalog.py": code})) == (
        [] if kept else ["constructor node/shards/catalog.py"]
    )


@pytest.mark.parametrize(
    ("call", "kept"),
    [
        ("path.replace(other)", False),
        ("path.rename(other)", False),
        ("text.replace('a', 'b')", True),
        ("dataclasses.replace(value)", True),
        ("moment.replace(hour=1)", True),
    ],
)
def test_files_are_replaced_by_one_module(tree: Tree, call: str, kept: bool) -> None:
    changed = {"node/shards/catalog.py": f'"""Files."""\n{call}\n'}
    assert violations(tree(changed)) == ([] if kept else ["rename node/shards/catalog.py"])


def test_awaited_rename_is_another_method(tree: Tree) -> None:
    code = '"""Files."""\nasync def go(handle, path):\n    await handle.rename(path)\n'
    assert violations(tree({"node/shards/catalog.py": code})) == []


@pytest.mark.parametrize(("name", "kept"), [("_WAIT_S", False), ("MAX_SECONDS", False), ("MAX_LEASES", True)])
def test_tests_do_not_patch_times(tree: Tree, name: str, kept: bool) -> None:
    changed = {"tests/test_catalog.py": f'def test_it(patch):\n    patch.setattr(module, "{name}", 0.1)\n'}
    assert violations(tree(changed)) == ([] if kept else ["patched-time tests/test_catalog.py:2"])


@pytest.mark.parametrize("under", ["", "if TYPE_CHECKING:\n    "], ids=["", "for type checkers"])
def test_modules_do_not_import_each_other(tree: Tree, under: str) -> None:
    circle = {
        "node/shards/catalog.py": '"""Files."""\nfrom node.shards.settings import y\n',
        "node/shards/settings.py": '"""Bounds."""\nfrom node.shards.piece_layer import z\n',
        "node/shards/piece_layer.py": module(60) + f"{under}from node.shards.catalog import x\n",
    }
    circle["node/shards/catalog.py"] += "x = 1\n" * 60
    assert violations(tree(circle)) == ["circle node/shards/catalog.py"]


def test_module_does_not_import_the_package_that_imports_it(tree: Tree) -> None:
    circle = {
        "node/shards/__init__.py": MAP + "from node.shards.settings import y\n",
        "node/shards/settings.py": '"""Bounds."""\nfrom node.shards import x\n',
    }
    assert violations(tree(circle)) == ["circle node/shards/__init__.py"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("begun anew", False),
        ("Nobody has it", False),
        ("a name that is no shard", False),
        ("there is no shard", True),
        ("it is no longer here", True),
        ("renewed", True),
    ],
)
def test_words_of_the_list_are_not_used(tree: Tree, text: str, kept: bool) -> None:
    real = Path(check_layout.__file__).with_name("word_list.txt").read_text()
    tested = {"tests/test_page.py": f"# {text}\n"}
    project = tree(tested | {"docs/page.md": f"A page.\n{text}\n", "scripts/tools/word_list.txt": real})
    assert violations(project) == ([] if kept else ["word docs/page.md:2"])


def test_program_prints_each_violation_and_fails(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tree({"node/shards/catalog.py": module(501)})
    monkeypatch.setattr(Project, "read", lambda root: project)
    assert check_layout.main() == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first == "node/shards/catalog.py: module-size: 501 lines; at most 500 are allowed"
    assert last == "layout: 1 module-size"
