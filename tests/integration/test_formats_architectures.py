"""Every architecture of the table, cut and run by the real llama.cpp: the whole model's logits to the bit.

They run in a child process: llama.cpp aborts on some wrong cuts, and that must be one failed test.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from node.formats import slices
from node.formats.architectures import TABLE, ArchitectureRule
from node.formats.cuts import cuttable
from node.formats.gguf import read_gguf
from node.formats.gguf_writer import write_gguf
from tests.support.gguf.random_models import LAYERS, VOCAB, write_random_model

PATTERN = [True, True, True, True, True, False] * 2
UNEVEN = (0, 2, 7, LAYERS)


def write_slices(model: Path, boundaries: tuple[int, ...], rule: ArchitectureRule) -> list[Path]:
    """Cut without asking whether it is legal."""
    gguf = read_gguf(model)
    paths = []
    for index in range(len(boundaries) - 1):
        plan = slices.plan_slice(gguf, rule, boundaries[-1], boundaries, index)
        paths.append(model.with_name(f"slice-{index}.gguf"))
        with model.open("rb") as source, paths[-1].open("wb") as out:
            write_gguf(plan, source, out)
    return paths


def logits(paths: Sequence[Path]) -> list[np.ndarray]:
    from node.pipeline.engine.batch import Slot
    from node.pipeline.engine.engine import Engine
    from node.pipeline.engine.settings import EngineSettings

    with Engine(EngineSettings(threads=1, ctx_size=256, max_sessions=1)) as engine:
        for index, path in enumerate(paths):
            engine.load(index, path)
        sequence = engine.open_sequence()
        tokens = np.array([(7 * n + 3) % VOCAB for n in range(24)], np.int32)
        found, position = [], 0
        for count in (16, *[1] * 8):
            slot = Slot(sequence, position, tokens[position : position + count], True)
            found += engine.forward(range(len(paths)), [slot])
            position += count
        return found


def difference(
    folder: Path,
    architecture: str,
    boundaries: tuple[int, ...] | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    layers: int = LAYERS,
    tied: bool | None = None,
) -> float:
    """Largest difference between the logits of the whole model and of its slices, over 24 tokens."""
    model = write_random_model(folder / "model.gguf", architecture, layers=layers, metadata=metadata, tied=tied)
    found = cuttable(read_gguf(model))
    rule = found.rule
    whole = logits([model])
    parts = logits(write_slices(model, boundaries or found.even(min(3, len(found.legal) + 1)), rule))
    assert len(whole) == len(parts) == 9
    assert all(np.isfinite(one).all() and one.std() > 0.1 for one in whole)
    return float(max(np.abs(one - other).max() for one, other in zip(whole, parts, strict=True)))


class Child:
    """A process that runs `difference` for one case after the other; another takes over if llama.cpp aborts it."""

    PROGRAM = (
        "import ast, sys, pathlib\n"
        f"sys.path[:0] = {[str(Path(__file__).parents[2])]!r}\n"
        "from tests.integration.test_formats_architectures import difference\n"
        "for line in sys.stdin:\n"
        "    folder, case, options = ast.literal_eval(line)\n"
        "    try: print(difference(pathlib.Path(folder), *case, **options), flush=True)\n"
        "    except Exception as err: print('!', repr(err)[:300], flush=True)\n"
    )

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def run(self, folder: Path, *cases: tuple[Any, ...]) -> list[float | str]:
        """The difference of each case, (*arguments, options); the text of the error if it failed."""
        return [self._one(folder, case[:-1], case[-1]) for case in cases]

    def _one(self, folder: Path, case: tuple[Any, ...], options: dict[str, Any]) -> float | str:
        if self._process is None:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", self.PROGRAM],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{(str(folder), case, options)!r}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline().strip()
        if not line:
            self.close()
            return f"aborted: {self._log.read_text()[-500:]}"
        return line if line.startswith("!") else float(line)

    def close(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    with closing(Child(tmp_path_factory.mktemp("child") / "stderr")) as child:
        yield child


def groups(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


@pytest.mark.parametrize("names", groups([*sorted(TABLE), "llama experts"], 6), ids=" ".join)
def test_slices_compute_what_the_whole_model_does(child: Child, tmp_path: Path, names: Sequence[str]) -> None:
    cases = [(name, {}) for name in names]
    assert dict(zip(names, child.run(tmp_path, *cases), strict=True)) == dict.fromkeys(names, 0.0)


def test_every_layer_may_begin_a_slice_where_the_table_gives_no_period(child: Child, tmp_path: Path) -> None:
    names = ["llama", "qwen2", "granite", "deepseek2", "dots1", "minicpm"]
    assert child.run(tmp_path, *((name, UNEVEN, {}) for name in names)) == [0.0] * len(names)


def test_periods_are_real(child: Child, tmp_path: Path) -> None:
    """Cut beside the period, the slices compute something else: the table forbids nothing for nothing."""
    names = ["gemma3", "gpt-oss", "cohere2", "olmo2", "smollm3"]
    found = child.run(tmp_path, *((name, (0, 3, 7, LAYERS), {}) for name in names))
    assert all(isinstance(value, float) and value > 0.1 for value in found), found


def test_refused_architectures_would_go_wrong(child: Child, tmp_path: Path) -> None:
    found = child.run(
        tmp_path,
        ("gemma", (0, 6, LAYERS), {}),
        ("gemma2", (0, 6, LAYERS), {}),
        ("exaone4", (0, 32, 64), {"layers": 64}),
    )
    assert all(isinstance(value, float) and value > 0.1 for value in found), found


def test_patterns_in_the_metadata_are_followed(child: Child, tmp_path: Path) -> None:
    period, each = {"attention.sliding_window_pattern": 4}, {"attention.sliding_window_pattern": PATTERN}
    windowless = {"attention.sliding_window": 0}
    found = child.run(
        tmp_path,
        ("gemma3", (0, 4, 8, LAYERS), period, {}),
        ("gemma3", UNEVEN, each, {}),
        ("gemma3", UNEVEN, windowless, {}),
        ("cohere2", UNEVEN, each, {}),
        ("gpt-oss", UNEVEN, each, {}),
    )
    assert found == [0.0] * 5


def test_tied_and_untied_outputs(child: Child, tmp_path: Path) -> None:
    found = child.run(tmp_path, ("llama", UNEVEN, {"tied": True}), ("llama", UNEVEN, {"tied": False}))
    assert found == [0.0, 0.0]


def test_a_value_for_each_layer_is_divided_with_the_layers(child: Child, tmp_path: Path) -> None:
    metadata = {"feed_forward_length": [128] * LAYERS, "attention.head_count_kv": [2] * LAYERS}
    assert child.run(tmp_path, ("llama", UNEVEN, metadata, {})) == [0.0]
