"""Checks the rules that keep the code in order: sizes, maps, names, constructors, import circles, words.

Each violation is a line `file: rule: what was found; what is allowed`; the exit status is 1 if there is one.
CONTRIBUTING.md says why each rule is there. import-linter checks who may import whom (`.importlinter`), ruff which
calls are banned (`pyproject.toml`).
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGES = ("protocol", "node", "torch_bridge")
PROGRAMS = ("scripts", "examples")
TESTS = ("tests",)

MOST_LINES = 500
LINES_WITHOUT_IDEA = 300
FEWEST_LINES = 60
SHORT_MODULES = {"settings", "errors", "interface", "interfaces", "main", "__main__"}
"""May be short although one module imports them: they say what a package is set to, raises, asks for, starts."""
PACKAGE_SIZE = range(3, 15)
PACKAGE_SIZE_EXEMPT = {
    "protocol": "a floor",
    "node": "a floor",
    "torch_bridge": "a floor",
    "node.http": "the server and its metrics, until it has sub-packages for what it serves",
}
MOST_COLLABORATORS = 7
CLASS_WORDS = re.compile(r"^Base|(Manager|Base|Impl|Helper|Utils?)$")
CLASS_WORDS_EXEMPT = {"O3CheckpointManager": "the users asked for it by name"}
MODULE_WORDS_EXEMPT = {"o3": "a product", "ggml": "a library", "v2": "a version"}
RENAMES = {"node.files": "the one module that replaces files", "protocol.signing": "imports nothing of node"}
"""May call Path.replace and Path.rename."""


@dataclass(frozen=True)
class Violation:
    path: str
    rule: str
    found: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.path}: {self.rule}: {self.found}; {self.allowed}"


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    """Dotted; a package's is that of its `__init__`."""
    path: str
    """Relative to the root."""
    text: str

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def package(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All of the tree, in the order of ast.walk."""
        return list(ast.walk(self.tree))

    @cached_property
    def classes(self) -> list[ast.ClassDef]:
        """All classes of the module, those in functions and other classes too."""
        return [node for node in self.nodes if isinstance(node, ast.ClassDef)] if "class " in self.text else []

    @property
    def public_classes(self) -> list[ast.ClassDef]:
        return [node for node in self.tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_"]


@dataclass(frozen=True)
class Project:
    """Everything that the rules look at."""

    modules: dict[str, Module]
    """Of the packages, by name."""
    programs: list[Module] = field(default_factory=list)
    tests: list[Module] = field(default_factory=list)
    nouns: frozenset[str] = frozenset()
    """Words of the glossary's first columns, in small letters."""
    words: list[tuple[re.Pattern[str], str]] = field(default_factory=list)
    """Words that are not used, and what to write."""
    prose: dict[str, str] = field(default_factory=dict)
    """Files whose words are checked: path -> text."""

    @classmethod
    def read(cls, root: Path) -> Project:
        modules = {module.name: module for module in _read(root, PACKAGES)}
        programs, tests = list(_read(root, PROGRAMS)), list(_read(root, TESTS))
        pages = [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]
        prose = {module.path: module.text for module in [*modules.values(), *programs]}
        prose |= {str(path.relative_to(root)): path.read_text() for path in pages}
        glossary = prose.get("docs/glossary.md", "")
        word_list = root / "scripts" / "tools" / "word_list.txt"
        words = read_words(word_list.read_text() if word_list.exists() else "")
        return cls(modules, programs, tests, read_nouns(glossary), words, prose)

    @property
    def sources(self) -> list[Module]:
        """The modules that are not a package's `__init__`."""
        return [module for module in self.modules.values() if not module.is_package]

    def children(self, package: str) -> list[Module]:
        """Modules and sub-packages of a package."""
        return [module for module in self.modules.values() if module.package == package]

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """Module -> modules that it imports anywhere in its text, for type checkers too.

        `from package import name` is an import of the module `name` if there is one, else of the package.
        """
        return {name: set(self._imports(module)) - {name} for name, module in self.modules.items()}

    def _imports(self, module: Module) -> Iterator[str]:
        for node in module.nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name in self.modules)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    if full in self.modules:
                        yield full
                    elif node.module in self.modules:
                        yield node.module


def _read(root: Path, folders: Iterable[str]) -> Iterator[Module]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield Module(name, str(path.relative_to(root)), path.read_text())


def read_nouns(glossary: str) -> frozenset[str]:
    """The words in the first column of the glossary's tables."""
    rows = re.findall(r"^\| ([^|]+) \|", glossary, re.MULTILINE)
    return frozenset(word for row in rows for word in re.findall(r"[a-z0-9]+", row.lower()))


def read_words(text: str) -> list[tuple[re.Pattern[str], str]]:
    lines = [line.split("\t") for line in text.splitlines() if line and line[0] != "#"]
    return [(re.compile(pattern, re.IGNORECASE), instead) for pattern, instead in lines]


# Rule 1: modules


def module_sizes(project: Project) -> Iterator[Violation]:
    """A module holds one idea, up to 500 lines; above 300 its docstring's first line says which."""
    for module in [*project.modules.values(), *project.programs]:
        if module.lines > MOST_LINES:
            yield Violation(module.path, "module-size", f"{module.lines} lines", f"at most {MOST_LINES} are allowed")
        if module.lines > LINES_WITHOUT_IDEA:
            first = (ast.get_docstring(module.tree) or "").partition("\n")[0]
            if not first.endswith(".") or re.search(r"[.!?;] ", first):
                allowed = f"above {LINES_WITHOUT_IDEA} lines it is one sentence, the module's idea"
                yield Violation(module.path, "module-idea", f"the docstring's first line is {first!r}", allowed)


def scraps(project: Project) -> Iterator[Violation]:
    """A module that is short and has one importer is part of it, or of a neighbour."""
    importers: defaultdict[str, set[str]] = defaultdict(set)
    for module in project.sources:
        for target in project.imports[module.name]:
            importers[target].add(module.name)
    for module in project.sources:
        (*_, importer), several = [None, *importers[module.name]], len(importers[module.name]) > 1
        if module.lines < FEWEST_LINES and importer and not several and module.stem not in SHORT_MODULES:
            found = f"{module.lines} lines, imported by {importer} alone"
            yield Violation(module.path, "scrap", found, f"merge it: below {FEWEST_LINES} it needs two importers")


# Rule 2: packages


def package_sizes(project: Project) -> Iterator[Violation]:
    """A package has 3 to 14 modules, or only sub-packages, two or more."""
    for package in project.modules.values():
        if not package.is_package or package.name in PACKAGE_SIZE_EXEMPT:
            continue
        children = project.children(package.name)
        count = sum(not child.is_package for child in children)
        if count not in PACKAGE_SIZE and not (count == 0 and len(children) > 1):
            allowed = f"{PACKAGE_SIZE[0]} to {PACKAGE_SIZE[-1]} are allowed, or sub-packages alone"
            yield Violation(package.path, "package-size", f"{count} modules", allowed)


_MAP_LINE = re.compile(r"^(\w+(?:, \w+)*)/?(?: {2,}\S.*)?$")


def package_maps(project: Project) -> Iterator[Violation]:
    """The docstring of an `__init__` names each module and sub-package, a line each: `name   what it is`."""
    for package in project.modules.values():
        children = {child.stem for child in project.children(package.name)}
        if not package.is_package or not children:
            continue
        lines = (ast.get_docstring(package.tree) or "").splitlines()[1:]
        named = {name for line in lines if (match := _MAP_LINE.match(line)) for name in match[1].split(", ")}
        if missing := sorted(children - named - {"__main__"}):
            found = f"the docstring does not name {', '.join(missing)}"
            yield Violation(package.path, "package-map", found, "it has a line `name   what it is` for each module")
        if stale := sorted(named - children):
            found = f"the docstring names {', '.join(stale)}"
            yield Violation(package.path, "package-map", found, "the package has no such module")


# Rule 3: names


def module_names(project: Project) -> Iterator[Violation]:
    """Each word of a module's name is a noun of docs/glossary.md, singular or plural."""
    for module in project.modules.values():
        if module.stem.startswith("__"):
            continue
        for word in module.stem.strip("_").split("_"):
            singular = {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)}
            if not singular & project.nouns and word not in MODULE_WORDS_EXEMPT:
                allowed = "a module's name is made of nouns of docs/glossary.md"
                yield Violation(module.path, "module-name", f"{word!r} is not in the glossary", allowed)


def class_names(project: Project) -> Iterator[Violation]:
    """A public class name is used once, and says what the class is. Programs are left out: nothing imports them."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for module in project.modules.values():
        for node in module.public_classes:
            places[node.name].append(module.path)
            if CLASS_WORDS.search(node.name) and node.name not in CLASS_WORDS_EXEMPT:
                allowed = "Manager, Base, Impl, Helper and Utils say nothing: name what it does"
                yield Violation(module.path, "class-name", f"class {node.name}", allowed)
    for name, paths in places.items():
        for path in paths[1:]:
            found = f"class {name}, as in {paths[0]}"
            yield Violation(path, "class-name", found, "a public class name is used once in the project")


# Rule 5: Protocols and constructors


def protocols(project: Project) -> Iterator[Violation]:
    """A Protocol has two implementations or more, those of tests too, and no class has its name.

    A class implements it if it names it as a base, or has all its members by name, inherited ones included. A Protocol
    that has `__call__` alone is the signature of a function.
    """
    known = [*project.modules.values(), *project.programs, *project.tests]
    classes = [(module, node) for module in known for node in module.classes]
    by_name: defaultdict[str, list[ast.ClassDef]] = defaultdict(list)
    for _, node in classes:
        by_name[node.name].append(node)
    interfaces = [(module, node) for module, node in classes if _is_protocol(node) and module.name in project.modules]
    others = [(module, node) for module, node in classes if not _is_protocol(node)]
    members = {id(node): _all_members(node, by_name) for _, node in classes}
    for module, protocol in interfaces:
        wanted = members[id(protocol)]
        same = [other.path for other, node in others if node.name == protocol.name and other.name in project.modules]
        if same:
            found = f"Protocol {protocol.name} has the name of a class in {same[0]}"
            yield Violation(module.path, "protocol-name", found, "an interface and its implementation differ in name")
        if wanted == {"__call__"}:
            continue
        count = sum(
            protocol.name in _ancestors(node, by_name) or (bool(wanted) and wanted <= members[id(node)])
            for _, node in others
        )
        if count < 2:
            found = f"Protocol {protocol.name} has {count} implementations"
            yield Violation(module.path, "protocol-use", found, "an interface has at least two, a test's double counts")


def _name(node: ast.expr) -> str:
    """The last part of a class's name in a base or annotation: `a.B[C]` is `B`."""
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_protocol(node: ast.ClassDef) -> bool:
    return any(re.match(r"(typing\.)?Protocol\b", ast.unparse(base)) for base in node.bases)


def _ancestors(node: ast.ClassDef, by_name: dict[str, list[ast.ClassDef]], seen: set[str] | None = None) -> set[str]:
    seen = set() if seen is None else seen
    for name in {_name(base) for base in node.bases} - seen:
        seen.add(name)
        for parent in by_name.get(name, []):
            _ancestors(parent, by_name, seen)
    return seen


def _all_members(node: ast.ClassDef, by_name: dict[str, list[ast.ClassDef]]) -> set[str]:
    inherited = [parent for name in _ancestors(node, by_name) for parent in by_name.get(name, [])]
    return {name for one in [node, *inherited] for name in _members(one)}


def _members(node: ast.ClassDef) -> Iterator[str]:
    """Methods, fields, and what a method assigns to `self`."""
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement.name
            for inner in ast.walk(statement):
                if (
                    isinstance(inner, ast.Attribute)
                    and isinstance(inner.ctx, ast.Store)
                    and _name(inner.value) == "self"
                ):
                    yield inner.attr
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id
        elif isinstance(statement, ast.Assign):
            yield from (target.id for target in statement.targets if isinstance(target, ast.Name))


def constructors(project: Project) -> Iterator[Violation]:
    """A constructor takes at most 7 collaborators.

    A collaborator is a parameter whose annotation names a class of the project that acts, or is a `Callable`.
    Values do not count: frozen dataclasses, structs, named tuples, enums, exceptions. The fields of a dataclass that is
    not frozen are the parameters of its constructor.
    """
    kinds: dict[str, bool] = {}
    for module in project.modules.values():
        for node in module.classes:
            kinds[node.name] = kinds.get(node.name, False) or not _is_value(node)
    acting = {name for name, acts in kinds.items() if acts} | {"Callable"}
    for module in project.modules.values():
        for node in module.classes:
            taken = [name for name, annotation in _parameters(node) if acting & _names(annotation)]
            if len(taken) > MOST_COLLABORATORS:
                found = f"{node.name} takes {len(taken)} collaborators ({', '.join(taken)})"
                allowed = f"at most {MOST_COLLABORATORS}; group them in a frozen dataclass"
                yield Violation(module.path, "constructor", found, allowed)


_VALUES = {"Struct", "NamedTuple", "Enum", "IntEnum", "StrEnum", "Flag", "TypedDict", "Exception", "BaseModel"}


def _dataclass(node: ast.ClassDef) -> str:
    """Its decorator as text, or nothing."""
    return next((text for text in map(ast.unparse, node.decorator_list) if "dataclass" in text), "")


def _is_value(node: ast.ClassDef) -> bool:
    bases = {_name(base) for base in node.bases}
    return bool(bases & _VALUES) or any(base.endswith("Error") for base in bases) or "frozen=True" in _dataclass(node)


def _parameters(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    decorator = _dataclass(node)
    generated = bool(decorator) and "frozen=True" not in decorator
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            parameters = [*statement.args.posonlyargs, *statement.args.args, *statement.args.kwonlyargs]
            yield from ((one.arg, one.annotation) for one in parameters if one.annotation)
        elif isinstance(statement, ast.AnnAssign) and "init=False" not in ast.unparse(statement) and generated:
            yield ast.unparse(statement.target), statement.annotation


def _names(annotation: ast.expr) -> set[str]:
    """The names in an annotation, but for those that a callable takes and returns."""
    if isinstance(annotation, ast.Subscript) and _name(annotation) == "Callable":
        return {"Callable"}
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return set(re.findall(r"\w+", annotation.value))
    own = {_name(annotation)}
    return own.union(*(_names(child) for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr)))


# Rule 6: one module replaces files


def renames(project: Project) -> Iterator[Violation]:
    """`Path.replace(target)` and `Path.rename(target)`, which ruff cannot ban: calls with a single argument.

    `dataclasses.replace` is something else, and so is a method that is awaited.
    """
    for module in [*project.modules.values(), *project.programs]:
        if module.name in RENAMES:
            continue
        awaited = {id(node.value) for node in module.nodes if isinstance(node, ast.Await)}
        for node in module.nodes:
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or id(node) in awaited:
                continue
            if node.func.attr not in ("replace", "rename") or _name(node.func.value) == "dataclasses":
                continue
            if len(node.args) == 1 and not node.keywords:
                found = f"line {node.lineno} calls {ast.unparse(node.func)}(...)"
                yield Violation(
                    module.path, "rename", found, "node/files.py replaces files, by three kinds of durability"
                )


# Rule 7: time is an argument


def patched_times(project: Project) -> Iterator[Violation]:
    """A test that is in a hurry passes a clock or a period: it does not patch a constant whose name ends in a unit."""
    for module in project.tests:
        for number, line in enumerate(module.text.splitlines(), 1):
            if match := re.search(r"setattr\(.*\"(_?[A-Z_]+_(?:S|MS|SECONDS)|_?[A-Z_]*SECONDS)\"", line):
                allowed = "make it an argument or a setting"
                yield Violation(f"{module.path}:{number}", "patched-time", f"a test patches {match[1]}", allowed)


# Rule 4: imports


def circles(project: Project) -> Iterator[Violation]:
    """No module imports itself by way of others, for type checkers neither."""
    graph = {name: sorted(targets) for name, targets in sorted(project.imports.items())}
    while circle := _circle(graph):
        importer, imported = circle[:2]
        graph[importer].remove(imported)
        found = " imports ".join(circle)
        yield Violation(project.modules[importer].path, "circle", found, "move what they share into a module below")


def _circle(graph: dict[str, list[str]]) -> list[str]:
    """Modules of which each imports the next, the first again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as err:
        imported_first: list[str] = err.args[1]
        return imported_first[::-1]
    return []


# Words


def words(project: Project) -> Iterator[Violation]:
    """Words of scripts/tools/word_list.txt stand in no code and on no page; tests are left out."""
    for path, text in project.prose.items():
        found = [(pattern, instead) for pattern, instead in project.words if pattern.search(text)]
        for number, line in enumerate(text.splitlines() if found else [], 1):
            for pattern, instead in found:
                if match := pattern.search(line):
                    yield Violation(f"{path}:{number}", "word", f"{match[0]!r}", f"write {instead}")


RULES: tuple[Callable[[Project], Iterator[Violation]], ...] = (
    module_sizes,
    scraps,
    package_sizes,
    package_maps,
    module_names,
    class_names,
    protocols,
    constructors,
    renames,
    patched_times,
    circles,
    words,
)


def main() -> int:
    project = Project.read(Path(__file__).resolve().parents[2])
    found = [violation for rule in RULES for violation in rule(project)]
    for violation in found:
        print(violation)
    counts = Counter(violation.rule for violation in found)
    print("layout:", ", ".join(f"{count} {rule}" for rule, count in counts.items()) or "as the rules say")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
