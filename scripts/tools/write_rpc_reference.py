"""Writes the tables of docs/rpc.md and docs/formats.md from the declarations, between markers:

    <!-- generated: command LOAD_SHARD -->
    ...
    <!-- end generated -->

After `generated:` comes a key of SECTIONS, with its argument. `--check` writes nothing and exits with 1 if a page is
out of date. In both modes a command, task type or notification without a section is an error.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import pkgutil
import re
import sys
import tomllib
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect as mi

import protocol.errors
from node.handlers.table import command_table
from node.rpc import RpcSettings
from protocol import ids, manifest, records
from protocol.commands import common, nodes, sessions, shards, tasks
from protocol.msgpackrpc import CLIENT_LIMITS, SERVER_LIMITS, Limits

ROOT = Path(__file__).resolve().parent.parent.parent
RPC_PAGE = "docs/rpc.md"
PAGES = (RPC_PAGE, "docs/formats.md")
Struct = type[msgspec.Struct]
_BLOCK = re.compile(r"(<!-- generated: ([^\n]+?) -->\n).*?(<!-- end generated -->)", re.DOTALL)
_NOTIFICATION = re.compile(r"([A-Z_]+) notification")
_HEX = re.compile(r"\[0-9a-f\]\{(\d+)\}")
_PATTERNS = {
    typing.get_args(manifest.FileName)[1].pattern: "a plain file name",
    typing.get_args(manifest.ManifestName)[1].pattern: "`name` or `owner/name`",
    typing.get_args(records.Host)[1].pattern: "a host name or IP address",
}


# What is declared


def commands() -> dict[str, tuple[Struct, Struct] | None]:
    """Command -> (parameters, result); None if the task type decides."""
    # Only the declarations of handlers are needed, so classes are passed in place of instances.
    parts: list[Any] = [kind for name, kind in typing.get_type_hints(command_table).items() if name != "return"]
    return {
        name: (command.params, typing.get_type_hints(command.handler)["return"]) if command.params else None
        for name, command in command_table(*parts).items()
    }


def task_types() -> dict[str, tuple[Struct, Struct]]:
    """Built-in task type -> (parameters, result)."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["shoal.tasks"]
    found = [pkgutil.resolve_name(target) for target in points.values()]
    return {task.name: (task.params, typing.get_type_hints(task.run)["return"]) for task in found}


def notifications() -> dict[str, Struct]:
    """Notification -> its parameters: the structs whose docstring begins with its name."""
    declared = (value for module in (shards, nodes, tasks, sessions) for value in vars(module).values())
    named = ((_NOTIFICATION.match(value.__doc__ or ""), value) for value in declared if inspect.isclass(value))
    return {match[1]: value for match, value in named if match}


# What the source says of a declaration


@functools.cache
def _documented(module: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Class, or "" for the module itself -> name -> (annotation or value as text, docstring below it)."""
    body = ast.parse(inspect.getsource(sys.modules[module])).body
    return {"": _assigned(body)} | {node.name: _assigned(node.body) for node in body if isinstance(node, ast.ClassDef)}


def _assigned(body: list[ast.stmt]) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for statement, below in zip(body, [*body[1:], None], strict=True):
        match below:
            case ast.Expr(value=ast.Constant(value=str(doc))):
                pass
            case _:
                doc = ""
        match statement:
            case (
                ast.AnnAssign(target=ast.Name(id=name), annotation=value)
                | ast.Assign(targets=[ast.Name(id=name)], value=value)
            ):
                found[name] = (ast.unparse(value), doc)
    return found


def field_doc(kind: type[Any], name: str) -> str:
    """The docstring below a field; if there is none, that of the named type in its annotation."""
    for owner in kind.__mro__:
        if name not in inspect.get_annotations(owner):
            continue
        annotation, doc = _documented(owner.__module__)[owner.__name__][name]
        for word in re.findall(r"\w+", annotation):
            for module in (ids, common, manifest):
                doc = doc or _documented(module.__name__)[""].get(word, ("", ""))[1]
        return doc
    return ""


# How it is shown


def type_text(kind: mi.Type) -> str:
    """A type in MessagePack's words, with its bounds."""
    match kind:
        case mi.Metadata(type=inner):
            return type_text(inner)
        case mi.UnionType(types=members):
            return " or ".join(sorted(map(type_text, members), key=lambda text: text == "nil"))
        case mi.NoneType():
            return "nil"
        case mi.LiteralType(values=values):
            return ", ".join(f'`"{value}"`' if isinstance(value, str) else f"`{value}`" for value in values)
        case mi.IntType(ge=ge, lt=lt, le=le):
            return _bounded("int", ge, le if lt is None else lt - 1)
        case mi.FloatType(gt=gt, ge=ge, le=le):
            return f"float, above {gt:g} to {le:g}" if gt is not None else _bounded("float", ge, le)
        case mi.StrType(min_length=least, max_length=most, pattern=pattern):
            if digits := _HEX.findall(pattern or ""):
                return f"str, {' or '.join(digits)} hex digits"
            text = _bounded("str", least, most, " characters")
            return f"{text}, {_PATTERNS.get(pattern, f'`{pattern}`')}" if pattern else text
        case mi.BytesType(min_length=least, max_length=most):
            return _bounded("bin", least, most, " bytes")
        case mi.VarTupleType() | mi.ListType():
            return _bounded(f"array of {type_text(kind.item_type)}", kind.min_length, kind.max_length, " of them")
        case mi.TupleType(item_types=items):
            return f"array of {', '.join(map(type_text, items))}"
        case mi.DictType(value_type=value):
            return f"map to {type_text(value)}"
        case mi.StructType(cls=cls):
            return f"`{cls.__name__}`"
        case _:
            return type(kind).__name__.removesuffix("Type").lower()


def _bounded(name: str, least: float | None, most: float | None, unit: str = "") -> str:
    if most is None:
        return name if least is None else f"{name}, at least {least:,}{unit}"
    return f"{name}, at most {most:,}{unit}" if least is None else f"{name}, {least:,} to {most:,}{unit}"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return [f"| {' | '.join(' '.join(cell.split()) for cell in line)} |".replace("|  |", "| |") for line in lines]


def _default(field: mi.Field) -> str:
    if field.required:
        return "required"
    match field.default:
        case None:
            return "none"
        case bool(value):
            return str(value).lower()
        case int() | float() | str() as value:
            return f"`{value}`"
        case _:
            return "empty"


def struct_table(kind: Struct, *, sent: bool) -> list[str]:
    """A struct as a table, and the structs within it below; `sent` for what a client sends, with defaults."""
    lines: list[str] = []
    for number, one in enumerate(_nested(kind)):
        if number:
            lines += ["", f"`{one.__name__}`: {' '.join((one.__doc__ or '').split())}", ""]
        declared = mi.type_info(one)
        assert isinstance(declared, mi.StructType)
        rows = []
        for field in declared.fields:
            cells = (f"`{field.encode_name}`", type_text(field.type), _default(field), field_doc(one, field.name))
            rows.append(tuple(cell.replace("|", "\\|") for cell in cells))
        if not sent:
            rows = [(name, text, doc) for name, text, _, doc in rows]
        header = ("field", "type", "default", "meaning") if sent else ("field", "type", "meaning")
        lines += table(header, rows) if rows else ["An empty map."]
    return lines


def _nested(kind: Struct) -> list[Struct]:
    """The struct, and those that its fields have, each once."""
    found = [kind]
    for one in found:
        for field in mi.type_info(one).fields:  # type: ignore[attr-defined]
            found += [cls for cls in _structs_in(field.type) if cls not in found]
    return found


def _structs_in(kind: Any) -> Iterator[Struct]:
    if isinstance(kind, mi.StructType):
        yield kind.cls
    for inner in (*getattr(kind, "types", ()), getattr(kind, "type", None), getattr(kind, "item_type", None)):
        if isinstance(inner, mi.Type):
            yield from _structs_in(inner)


# The sections


def _exchange(params: Struct, result: Struct) -> list[str]:
    return ["Parameters:", "", *struct_table(params, sent=True), "", "Result:", "", *struct_table(result, sent=False)]


def _errors() -> list[str]:
    rows = []
    for error in vars(protocol.errors).values():
        if inspect.isclass(error) and protocol.errors.ShoalError in error.__mro__[1:]:
            meaning = (error.__doc__ or "").removeprefix("Raised when ")
            rows.append((f"`{error.code}`", "yes" if error.retryable else "no", meaning[:1].upper() + meaning[1:]))
    return table(("code", "retryable", "when"), rows)


def _limits() -> list[str]:
    rows = []
    for field in dataclasses.fields(Limits):
        server, client = getattr(SERVER_LIMITS, field.name), getattr(CLIENT_LIMITS, field.name)
        rows.append((f"`{field.name}`", f"{server:,}", f"{client:,}", field_doc(Limits, field.name)))
    lines = table(("of one message", "node", "our clients", "meaning"), rows)
    bounds = [field for field in dataclasses.fields(RpcSettings) if field.name != "limits"]
    rest = [(f"`{field.name}`", f"{field.default:,}", field_doc(RpcSettings, field.name)) for field in bounds]
    return [*lines, "", *table(("of a node", "value", "meaning"), rest)]


SECTIONS = {
    "command": lambda name: _exchange(*(commands()[name] or ())),
    "task": lambda name: _exchange(*task_types()[name]),
    "notification": lambda name: struct_table(notifications()[name], sent=False),
    "struct": lambda path: struct_table(pkgutil.resolve_name(path), sent=True),
    "errors": _errors,
    "limits": _limits,
}


def render(page: str) -> str:
    """The page with its generated sections up to date. Raises KeyError for a section without a declaration."""

    def fill(found: re.Match[str]) -> str:
        what, *subject = found[2].split()
        return found[1] + "".join(f"{line}\n" for line in ["", *SECTIONS[what](*subject), ""]) + found[3]

    return _BLOCK.sub(fill, page)


def missing(page: str) -> list[str]:
    """Sections that docs/rpc.md lacks."""
    wanted = {f"command {name}" for name, exchange in commands().items() if exchange} | {"errors", "limits"}
    wanted |= {f"task {name}" for name in task_types()} | {f"notification {name}" for name in notifications()}
    return sorted(wanted - {found[2] for found in _BLOCK.finditer(page)})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args(argv).check
    old = {name: (ROOT / name).read_text() for name in PAGES}
    problems = [f"{RPC_PAGE} has no section for: {section}" for section in missing(old[RPC_PAGE])]
    for name, page in old.items():
        new = render(page)
        if new != page and check:
            sys.stderr.writelines(difflib.unified_diff(page.splitlines(True), new.splitlines(True), name, "declared"))
            problems.append(f"{name} is out of date: run scripts/tools/write_rpc_reference.py")
        elif new != page:
            (ROOT / name).write_text(new)
    print("".join(f"{problem}\n" for problem in problems), end="", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
