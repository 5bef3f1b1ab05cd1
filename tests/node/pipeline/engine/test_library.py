"""The guard before the library, its log, and the memory estimate."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from node.formats.gguf import read_gguf
from node.formats.hyperparameters import model_sizes
from node.pipeline.engine import llama
from node.pipeline.engine.engine import Engine
from node.pipeline.engine.log import MAX_LINE_CHARS, MAX_LINES_PER_MINUTE, LineLog
from node.pipeline.engine.memory import estimate_memory
from node.pipeline.engine.settings import EngineSettings
from protocol.errors import InsufficientMemoryError, InvalidParamsError, UnsupportedPlatformError
from tests.support.gguf.tiny_gguf import write_tiny_gguf


def test_another_version_of_the_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "WHEEL_VERSION", "2099.1.1")
    with pytest.raises(UnsupportedPlatformError, match=r"only 2099\.1\.1 works"):
        llama._find()


def test_a_missing_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "WHEEL", "no-such-wheel")
    with pytest.raises(UnsupportedPlatformError, match="not installed"):
        llama._find()


def test_another_layout_is_refused() -> None:
    """A context struct without its `moe_cache_size`, as in versions before: what follows it is shifted."""

    class Older(llama.ctypes.Structure):
        _fields_ = [field for field in llama.ContextParams._fields_ if field[0] != "moe_cache_size"]

    defaults = bytes(llama.library().llama_context_default_params())
    shifted = Older.from_buffer_copy(defaults)
    expected = {name: value for name, value in llama._CONTEXT_DEFAULTS.items() if name != "moe_cache_size"}
    with pytest.raises(UnsupportedPlatformError, match="offload_kqv"):
        llama.check_defaults(shifted, expected)


def test_lines_are_put_together_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "shoal.llama")
    lines = LineLog()
    lines.feed(2, "load_", 0.0)
    lines.feed(5, "tensors: done\nnext", 0.0)
    lines.feed(5, "\n.....", 0.0)
    lines.feed(5, "\n", 0.0)
    assert [record.getMessage() for record in caplog.records] == ["load_tensors: done", "next"]
    caplog.clear()
    lines.feed(4, "x" * 10_000 + "\n", 0.0)
    assert len(caplog.records[0].getMessage()) == MAX_LINE_CHARS
    assert caplog.records[0].levelno == logging.WARNING
    for _ in range(10_000):
        lines.feed(2, "again\n", 1.0)
    assert len(caplog.records) <= MAX_LINES_PER_MINUTE
    caplog.clear()
    lines.feed(2, "later\n", 100.0)
    assert [record.getMessage() for record in caplog.records] == ["later"]
    assert len(lines.take_problems()) == MAX_LINE_CHARS
    assert lines.take_problems() == ""


def test_nothing_is_written_to_stdout_or_stderr(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    code = (
        "import sys; from pathlib import Path; from node.pipeline.engine.engine import *;"
        "engine = Engine(EngineSettings(ctx_size=256, max_sessions=1));"
        "engine.load(0, Path(sys.argv[1])); engine.close()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=50, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")


def test_an_abort_is_logged_before_it_ends_the_process(tmp_path: Path) -> None:
    """A vocabulary with one token many times: ggml asserts, and only another process survives that."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", {"tokenizer.ggml.tokens": ["a"] * 300})
    code = (
        "import sys; from pathlib import Path; from node.pipeline.engine.engine import *;"
        "Engine(EngineSettings(ctx_size=256, max_sessions=1)).load(0, Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=50, check=False)
    assert done.returncode == -6
    assert b"llama.cpp ends this process" in done.stderr
    assert b"GGML_ASSERT" in done.stderr


def test_settings_are_checked() -> None:
    for wrong in ({"threads": 0}, {"ctx_size": 0}, {"max_sessions": 257}):
        with pytest.raises(InvalidParamsError, match=next(iter(wrong))):
            EngineSettings(**wrong)
    assert EngineSettings(ctx_size=1000).padded_ctx_size == 1024
    assert EngineSettings(max_sessions=40).batch_capacity == 40


def test_the_estimate_grows_with_what_is_kept(tmp_path: Path) -> None:
    """KV cache: 4 layers, 2 heads of 16 for keys and for values, 2 bytes each, for every position."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    sizes = model_sizes(read_gguf(path))
    small, long, many = (
        estimate_memory(sizes, EngineSettings(ctx_size=ctx_size, max_sessions=sessions))
        for ctx_size, sessions in ((1024, 1), (2048, 1), (1024, 5))
    )
    cache = 4 * 2 * (16 + 16) * 2 * 1024
    assert many - small == 4 * cache
    assert long - small >= cache
    assert small > path.stat().st_size


def test_an_estimate_is_an_upper_bound(tmp_path: Path) -> None:
    """In a process of its own: what loading adds to the resident memory stays below it."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    code = (
        "import os, sys, psutil; from pathlib import Path; from node.pipeline.engine.engine import *;"
        "settings = EngineSettings(ctx_size=65536, max_sessions=4); engine = Engine(settings);"
        "before = psutil.Process().memory_info().rss; info = engine.load(0, Path(sys.argv[1]));"
        "print(psutil.Process().memory_info().rss - before, info.memory_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=50, check=True)
    grown, estimated = map(int, done.stdout.split())
    assert 100 << 20 < grown < estimated < 2 * grown


def test_too_little_memory_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    settings = EngineSettings(ctx_size=1 << 20, max_sessions=200)
    assert estimate_memory(model_sizes(read_gguf(path)), settings) > 100 << 30
    with Engine(settings) as engine:
        monkeypatch.setattr("node.pipeline.engine.memory.available_memory_bytes", lambda: 100 << 30)
        with pytest.raises(InsufficientMemoryError, match="MiB are available"):
            engine.load(0, path)
        assert engine.loaded() == {}
