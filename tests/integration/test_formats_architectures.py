"""Every architecture of the table, cut and run by the real llama.cpp: the whole model's logits to the bit.

Each runs in a child process: llama.cpp aborts on some wrong cuts, and that must be one failed test.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
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


def in_child(folder: Path, *cases: tuple[Any, ...]) -> list[float | str]:
    """Run `difference(folder, *case)` for each case in one process; what fails is its error's text."""
    program = (
        "import sys, pathlib\n"
        f"sys.path[:0] = {[str(Path(__file__).parents[2])]!r}\n"
        "from tests.integration.test_formats_architectures import difference\n"
        "PATTERN = [True, True, True, True, True, False] * 2\n"
        f"for case, options in {[(case[:-1], case[-1]) for case in cases]!r}:\n"
        f"    try: print(difference(pathlib.Path({str(folder)!r}), *case, **options), flush=True)\n"
        "    except Exception as err: print('!', repr(err)[:300], flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    lines = done.stdout.splitlines()
    results: list[float | str] = [line if line.startswith("!") else float(line) for line in lines]
    return results + [f"aborted: {done.stderr[-500:]}"] * (len(cases) - len(results))


def groups(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


@pytest.mark.parametrize("names", groups([*sorted(TABLE), "llama experts"], 6), ids=" ".join)
def test_slices_compute_what_the_whole_model_does(tmp_path: Path, names: Sequence[str]) -> None:
    cases = [(name, {}) for name in names]
    assert dict(zip(names, in_child(tmp_path, *cases), strict=True)) == dict.fromkeys(names, 0.0)


def test_every_layer_may_begin_a_slice_where_the_table_gives_no_period(tmp_path: Path) -> None:
    names = ["llama", "qwen2", "granite", "deepseek2", "dots1", "minicpm"]
    assert in_child(tmp_path, *((name, UNEVEN, {}) for name in names)) == [0.0] * len(names)


def test_periods_are_real(tmp_path: Path) -> None:
    """Cut beside the period, the slices compute something else: the table forbids nothing for nothing."""
    names = ["gemma3", "gpt-oss", "cohere2", "olmo2", "smollm3"]
    found = in_child(tmp_path, *((name, (0, 3, 7, LAYERS), {}) for name in names))
    assert all(isinstance(value, float) and value > 0.1 for value in found), found


def test_refused_architectures_would_go_wrong(tmp_path: Path) -> None:
    found = in_child(
        tmp_path,
        ("gemma", (0, 6, LAYERS), {}),
        ("gemma2", (0, 6, LAYERS), {}),
        ("exaone4", (0, 32, 64), {"layers": 64}),
    )
    assert all(isinstance(value, float) and value > 0.1 for value in found), found


def test_patterns_in_the_metadata_are_followed(tmp_path: Path) -> None:
    period, each = {"attention.sliding_window_pattern": 4}, {"attention.sliding_window_pattern": PATTERN}
    windowless = {"attention.sliding_window": 0}
    found = in_child(
        tmp_path,
        ("gemma3", (0, 4, 8, LAYERS), period, {}),
        ("gemma3", UNEVEN, each, {}),
        ("gemma3", UNEVEN, windowless, {}),
        ("cohere2", UNEVEN, each, {}),
        ("gpt-oss", UNEVEN, each, {}),
    )
    assert found == [0.0] * 5


def test_tied_and_untied_outputs(tmp_path: Path) -> None:
    found = in_child(tmp_path, ("llama", UNEVEN, {"tied": True}), ("llama", UNEVEN, {"tied": False}))
    assert found == [0.0, 0.0]


def test_a_value_for_each_layer_is_divided_with_the_layers(tmp_path: Path) -> None:
    metadata = {"feed_forward_length": [128] * LAYERS, "attention.head_count_kv": [2] * LAYERS}
    assert in_child(tmp_path, ("llama", UNEVEN, metadata, {})) == [0.0]
