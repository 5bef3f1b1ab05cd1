"""Slices of a model against the whole of it, batches against single sessions, and what the engine refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from node.pipeline.engine.batch import Slot
from node.pipeline.engine.engine import Engine
from node.pipeline.engine.settings import PREFILL_CHUNK, EngineSettings
from protocol.errors import (
    BusyError,
    ContextOverflowError,
    EngineError,
    InvalidParamsError,
    InvalidShardError,
    ShardNotLoadedError,
)
from tests.support.gguf.tiny_gguf import N_EMBD, N_VOCAB, write_tiny_gguf

SETTINGS = EngineSettings(threads=1, ctx_size=512, max_sessions=4)
CUTS = [(0, 1), (1, 3), (3, 4)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {cut: write_tiny_gguf(folder / f"{cut[0]}-{cut[1]}.gguf", layers=cut) for cut in [(0, 4), *CUTS]}


@pytest.fixture
def whole(files: dict[tuple[int, int], Path]) -> Iterator[Engine]:
    with Engine(SETTINGS) as engine:
        engine.load(0, files[0, 4])
        yield engine


@pytest.fixture
def sliced(files: dict[tuple[int, int], Path]) -> Iterator[Engine]:
    with Engine(SETTINGS) as engine:
        for shard_id, cut in enumerate(CUTS):
            engine.load(shard_id, files[cut])
        yield engine


def tokens_of(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, N_VOCAB, n, dtype=np.int32)


def feed(engine: Engine, shard_ids: list[int], sequence: int, tokens: np.ndarray, position: int = 0) -> np.ndarray:
    """Prefill in chunks; the logits (or the last chunk's hidden states) at the end."""
    out = np.empty(0, np.float32)
    for start in range(0, len(tokens), PREFILL_CHUNK):
        part = tokens[start : start + PREFILL_CHUNK]
        is_end = start + PREFILL_CHUNK >= len(tokens)
        (out,) = engine.forward(shard_ids, [Slot(sequence, position + start, part, is_end)])
    return out


def test_shards_know_their_place(sliced: Engine, whole: Engine) -> None:
    infos = sliced.loaded()
    assert [(info.is_first, info.is_last) for info in infos.values()] == [(True, False), (False, False), (False, True)]
    assert [(info.start_layer, info.end_layer, info.n_layers) for info in infos.values()] == [
        (0, 1, 1),
        (1, 3, 2),
        (3, 4, 1),
    ]
    assert {info.n_embd for info in infos.values()} == {N_EMBD}
    info = whole.loaded()[0]
    assert info.is_first
    assert info.is_last
    assert (info.n_layers, info.n_vocab) == (4, N_VOCAB)


def test_slices_equal_the_whole_to_the_bit(sliced: Engine, whole: Engine) -> None:
    """300 tokens: the attended cells are padded to 256, so the graph changes on the way."""
    one, other = whole.open_sequence(), sliced.open_sequence()
    prompt = tokens_of(1, 250)
    expected, found = feed(whole, [0], one, prompt), feed(sliced, [0, 1, 2], other, prompt)
    assert np.array_equal(expected, found)
    for position in range(250, 300):
        token = np.array([int(expected.argmax())], np.int32)
        (expected,) = whole.forward([0], [Slot(one, position, token)])
        (found,) = sliced.forward([0, 1, 2], [Slot(other, position, token)])
        assert np.array_equal(expected, found)
    assert expected.std() > 0.1


def test_a_stage_hands_out_every_row_of_the_hidden_state(sliced: Engine) -> None:
    """Shards in one run, and one by one with the state carried outside, are the same."""
    together, apart = sliced.open_sequence(), sliced.open_sequence()
    tokens = tokens_of(2, 7)
    (hidden,) = sliced.forward([0, 1], [Slot(together, 0, tokens)])
    assert hidden.shape == (7, N_EMBD)
    assert hidden.dtype == np.float32
    (state,) = sliced.forward([0], [Slot(apart, 0, tokens)])
    assert state.shape == (7, N_EMBD)
    assert not np.array_equal(state, hidden)
    (carried,) = sliced.forward([1], [Slot(apart, 0, state)])
    assert np.array_equal(carried, hidden)
    kept = hidden.copy()
    sliced.forward([0, 1], [Slot(together, 7, tokens)])
    assert np.array_equal(hidden, kept), "what forward returned belongs to the caller"


def test_a_place_that_was_counted_wrong_never_gives_another_tensor(sliced: Engine) -> None:
    """The counted index is checked by name: too early, it is found later; too late, the decode is done again."""
    tokens = tokens_of(3, 20)
    clean = sliced.open_sequence()
    expected = [sliced.forward([0, 1], [Slot(clean, at, tokens[at : at + 1])])[0] for at in range(20)]
    tap = sliced._shards[1].tap
    assert tap is not None
    index = tap._indices[1, 1]
    assert index > 10
    checked = sliced.open_sequence()
    for at, shift in enumerate([-1, 1, 2, -index + 1, 1000, 0, 3]):
        tap._indices[1, 1] = index + shift
        (found,) = sliced.forward([0, 1], [Slot(checked, at, tokens[at : at + 1])])
        assert np.array_equal(found, expected[at]), shift
    sliced.forward([0, 1], [Slot(checked, 7, tokens[7:8])])
    assert tap._indices[1, 1] == index, "and the right one is learnt again"


def test_a_session_alone_does_not_depend_on_what_others_cached(sliced: Engine, whole: Engine) -> None:
    for engine, shard_ids in ((whole, [0]), (sliced, [0, 1, 2])):
        first = engine.open_sequence()
        prompt = tokens_of(4, 40)
        expected = feed(engine, shard_ids, first, prompt)
        engine.close_sequence(first)
        others = [engine.open_sequence() for _ in range(3)]
        for number, other in enumerate(others):
            feed(engine, shard_ids, other, tokens_of(10 + number, 50 + 90 * number))
        engine.close_sequence(others[1])
        again = engine.open_sequence()
        assert again == others[1], "the lowest free number: its cache held another session"
        assert np.array_equal(feed(engine, shard_ids, again, prompt), expected)


def test_several_sessions_in_one_batch(sliced: Engine) -> None:
    """Slots of one and of several values, in any order, with a gap between the sequences: every one gets its own."""
    run = [0, 1, 2]
    prompts = [tokens_of(20 + number, 5 + 3 * number) for number in range(4)]
    sequences = [sliced.open_sequence() for _ in prompts]
    alone = []
    for sequence, prompt in zip(sequences, prompts, strict=True):
        feed(sliced, run, sequence, prompt[:-1])
        alone.append(sliced.forward(run, [Slot(sequence, len(prompt) - 1, prompt[-1:])])[0])
        sliced.close_sequence(sequence)
        assert sliced.open_sequence() == sequence
        feed(sliced, run, sequence, prompt[:-1])
    slots = [Slot(sequence, len(prompt) - 1, prompt[-1:]) for sequence, prompt in zip(sequences, prompts, strict=True)]
    order = [3, 1, 0]
    for index, logits in zip(order, sliced.forward(run, [slots[index] for index in order]), strict=True):
        np.testing.assert_allclose(logits, alone[index], rtol=1e-4, atol=1e-4)
    tap = sliced._shards[0].tap
    assert tap is not None
    assert (2, 2) in tap._indices, "the neighbours 0 and 1 went through in one graph"
    more = tokens_of(30, 6)
    outs = sliced.forward([0], [Slot(2, len(prompts[2]) - 1, prompts[2][-1:]), Slot(0, len(prompts[0]), more)])
    assert [out.shape for out in outs] == [(1, N_EMBD), (6, N_EMBD)]
    with pytest.raises(InvalidParamsError, match="twice"):
        sliced.forward(run, [slots[2], slots[2]])


def test_logits_only_where_they_are_wanted(whole: Engine) -> None:
    first, second = whole.open_sequence(), whole.open_sequence()
    one, other = whole.forward([0], [Slot(first, 0, tokens_of(5, 3), False), Slot(second, 0, tokens_of(5, 3))])
    assert one.shape == (0,)
    assert other.shape == (N_VOCAB,)


def test_prefill_that_wants_no_logits_computes_the_same(whole: Engine) -> None:
    first, second = whole.open_sequence(), whole.open_sequence()
    tokens = tokens_of(6, 8)
    whole.forward([0], [Slot(first, 0, tokens[:7], False)])
    whole.forward([0], [Slot(second, 0, tokens[:7], True)])
    (one,), (other,) = (whole.forward([0], [Slot(sequence, 7, tokens[7:])]) for sequence in (first, second))
    assert np.array_equal(one, other)


def test_what_forward_refuses(sliced: Engine) -> None:
    sequence = sliced.open_sequence()
    token = tokens_of(7, 1)
    with pytest.raises(ShardNotLoadedError, match="shard 9"):
        sliced.forward([9], [Slot(sequence, 0, token)])
    with pytest.raises(InvalidParamsError, match=r"ends at layer 1, .* starts at layer 3"):
        sliced.forward([0, 2], [Slot(sequence, 0, token)])
    with pytest.raises(InvalidParamsError, match="not open"):
        sliced.forward([0], [Slot(3, 0, token)])
    with pytest.raises(InvalidParamsError, match="float32"):
        sliced.forward([1], [Slot(sequence, 0, token)])
    with pytest.raises(InvalidParamsError, match="int32"):
        sliced.forward([0], [Slot(sequence, 0, np.zeros((1, N_EMBD), np.float32))])
    with pytest.raises(InvalidParamsError, match="at most 32"):
        sliced.forward([0], [Slot(sequence, 0, tokens_of(7, 33))])
    with pytest.raises(InvalidParamsError, match="at least one"):
        sliced.forward([0], [])
    with pytest.raises(ContextOverflowError, match="512"):
        sliced.forward([0], [Slot(sequence, 511, tokens_of(7, 2))])
    with pytest.raises(EngineError, match="llama_decode: -1"):
        sliced.forward([0], [Slot(sequence, 0, np.array([N_VOCAB], np.int32))])
    sliced.forward([0], [Slot(sequence, 0, token)])
    with pytest.raises(EngineError, match="llama_decode: -1"):  # a hole in the positions
        sliced.forward([0], [Slot(sequence, 5, token)])
    sliced.forward([0, 1, 2], [Slot(sliced.open_sequence(), 0, token)])  # and it goes on


def test_sessions_are_bounded_and_freed(whole: Engine) -> None:
    sequences = [whole.open_sequence() for _ in range(4)]
    with pytest.raises(BusyError, match="4 sessions"):
        whole.open_sequence()
    whole.close_sequence(sequences[2])
    whole.close_sequence(sequences[2])
    assert whole.open_sequence() == sequences[2]
    with pytest.raises(BusyError):
        whole.open_sequence()


def test_unload_frees_the_shard_and_its_vocabulary(sliced: Engine, files: dict[tuple[int, int], Path]) -> None:
    vocabulary = sliced.vocabulary(0)
    assert vocabulary.is_end(2)
    with pytest.raises(EngineError, match="already"):
        sliced.load(0, files[0, 1])
    sliced.unload(0)
    with pytest.raises(ShardNotLoadedError):
        sliced.unload(0)
    with pytest.raises(EngineError, match="unloaded"):
        vocabulary.is_end(2)
    sliced.load(0, files[0, 1])
    sliced.forward([0, 1, 2], [Slot(sliced.open_sequence(), 0, tokens_of(8, 4))])


BROKEN: dict[str, dict[str, object]] = {
    "more layers than tensors": {"llama.block_count": 5},
    "fewer layers than tensors": {"llama.block_count": 3},
    "no layer": {"llama.block_count": 0},
    "too many layers": {"llama.block_count": 600},
    "heads that do not fit": {"llama.attention.head_count": 3},
    "another width": {"llama.embedding_length": 128},
    "a negative epsilon": {"llama.attention.layer_norm_rms_epsilon": -1.0},
    "no epsilon": {"llama.attention.layer_norm_rms_epsilon": None},
    "a text for a number": {"llama.attention.head_count": "4"},
    "more experts used than there are": {"llama.expert_count": 4, "llama.expert_used_count": 8},
    "an unknown rope scaling": {"llama.rope.scaling.type": "bogus"},
    "an unknown tokenizer": {"tokenizer.ggml.model": "xyz"},
    "a tokenizer that does not generate": {"tokenizer.ggml.model": "bert"},
    "fewer tokens than rows": {"tokenizer.ggml.tokens": ["a", "b"]},
    "no merges": {"tokenizer.ggml.model": "gpt2"},
    "layers that are not there": {
        "shoal.shard.start_layer": 0,
        "shoal.shard.end_layer": 9,
        "shoal.model.n_layers": 9,
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_an_error_and_never_an_abort(name: str, tmp_path: Path, whole: Engine) -> None:
    path = write_tiny_gguf(tmp_path / "broken.gguf", BROKEN[name])
    with pytest.raises(InvalidShardError, match=r"broken\.gguf"):
        whole.load(1, path)
    assert list(whole.loaded()) == [0]


def test_files_that_are_no_models(tmp_path: Path, whole: Engine, files: dict[tuple[int, int], Path]) -> None:
    with pytest.raises(InvalidShardError, match="cannot read"):
        whole.load(1, tmp_path / "missing.gguf")
    data = files[0, 4].read_bytes()
    for content in (b"", b"not a model", data[:100], data[: len(data) // 2], data[:-1]):
        (tmp_path / "cut.gguf").write_bytes(content)
        with pytest.raises(InvalidShardError):
            whole.load(1, tmp_path / "cut.gguf")
    with pytest.raises(InvalidShardError, match="unknown model architecture"):
        whole.load(1, _other_architecture(tmp_path / "other.gguf"))


def _other_architecture(path: Path) -> Path:
    values = {
        "nonsense.block_count": 4,
        "nonsense.embedding_length": N_EMBD,
        "nonsense.attention.head_count": 4,
    }
    return write_tiny_gguf(path, values, architecture="nonsense")


def test_weights_that_are_no_numbers_are_noticed(tmp_path: Path) -> None:
    from protocol.commands.tasks import Sampling

    with Engine(SETTINGS) as engine:
        engine.load(0, write_tiny_gguf(tmp_path / "nan.gguf", scale=float("nan")))
        (logits,) = engine.forward([0], [Slot(engine.open_sequence(), 0, tokens_of(9, 3))])
        for temperature in (0.0, 1.0):
            with pytest.raises(EngineError, match="nan"):
                engine.sample(logits, Sampling(temperature=temperature), 3)
