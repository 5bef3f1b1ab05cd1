"""Text to tokens and back, by the tokenizer of a GGUF."""

from __future__ import annotations

import ctypes

import numpy as np

from node.pipeline.engine.llama import library
from protocol.errors import EngineError, InvalidParamsError

MAX_TEXT_BYTES = 64 * 1024 * 1024
_NO_TOKEN = -1
_NO_VOCABULARY = 0


class Vocabulary:
    """The tokenizer of a loaded shard, valid until it is unloaded. A model's first and last shard have one."""

    def __init__(self, model: int) -> None:
        lib = library()
        self._vocab = lib.llama_model_get_vocab(model)
        if lib.llama_vocab_type(self._vocab) == _NO_VOCABULARY:
            raise EngineError("this shard has no tokenizer: only the first and the last shard of a model have one")
        self._pieces: dict[int, bytes] = {}
        self.size: int = lib.llama_vocab_n_tokens(self._vocab)
        """Number of tokens."""
        template = lib.llama_model_chat_template(model, None)
        self.chat_template: str | None = None if template is None else template.decode(errors="replace")
        """The jinja2 source in the GGUF's metadata."""
        self.bos_text = self._special(lib.llama_vocab_bos(self._vocab))
        """Begin-of-sequence token as text, for chat templates; empty if the model has none."""
        self.eos_text = self._special(lib.llama_vocab_eos(self._vocab))
        """End-of-sequence token as text; empty if the model has none."""
        self.adds_bos: bool = lib.llama_vocab_get_add_bos(self._vocab)
        """Whether this tokenizer puts a BOS token before a plain prompt (`tokenizer.ggml.add_bos_token`)."""

    def close(self) -> None:
        """Called when the shard is unloaded; every later call raises EngineError."""
        self._vocab = None

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        A plain prompt: `add_special=True` puts the tokens around it that the tokenizer's own rule asks for (BOS,
        EOS), and text like `<|im_start|>` stays text. A rendered chat template: `add_special=False`, since the
        template writes its BOS itself, and `parse_special=True`.
        """
        data = text.encode("utf-8", "surrogatepass")
        if len(data) > MAX_TEXT_BYTES:
            raise InvalidParamsError(f"the text has {len(data)} bytes, allowed are {MAX_TEXT_BYTES}; shorten it")
        capacity = len(data) // 3 + 16
        while True:
            tokens = np.empty(capacity, np.int32)
            n = library().llama_tokenize(
                self._handle(), data, len(data), tokens.ctypes.data, capacity, add_special, parse_special
            )
            if 0 <= n <= capacity:
                return [int(token) for token in tokens[:n]]
            if -n <= capacity:  # or the loop would not end; INT32_MIN: more than 2**31 tokens
                raise EngineError(f"llama.cpp cannot tokenize a text of {len(data)} bytes")
            capacity = -n

    def piece(self, token: int) -> bytes:
        """The bytes of text of a token; empty for control tokens. A character may span several tokens."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._render(self._checked(token), special=False)
        return found

    def is_end(self, token: int) -> bool:
        """Whether a token ends the answer: end of sequence, of turn, of message (`llama_vocab_is_eog`)."""
        return bool(library().llama_vocab_is_eog(self._handle(), self._checked(token)))

    def _render(self, token: int, *, special: bool) -> bytes:
        capacity = 64
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            n = library().llama_token_to_piece(self._handle(), token, buffer, capacity, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            capacity = -n

    def _special(self, token: int) -> str:
        return "" if token == _NO_TOKEN else self._render(token, special=True).decode(errors="replace")

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.size:
            raise InvalidParamsError(f"token {token} is not in the vocabulary, which has 0 to {self.size - 1}")
        return token

    def _handle(self) -> int:
        if self._vocab is None:
            raise EngineError("the shard that this vocabulary came from is unloaded")
        return int(self._vocab)
