"""A model's hyperparameters as its GGUF header gives them; those that would end llama.cpp's process are refused.

llama.cpp answers most broken files with an error. Some it answers with GGML_ASSERT, which calls abort(), or with a
C++ exception that no C caller can catch. Tried with version 2026.10.11549 of the wheel, on small models broken on
purpose: the ones that the header shows are refused by `check`; what remains (two equal tokens in a vocabulary, a
byte token that is missing, a layer without key-value heads in an architecture that needs them) kills the engine's
process, which is why the engine has one of its own.
"""

from __future__ import annotations

import math

import msgspec

from node.formats.gguf import GgufFile, GgufValue
from protocol.errors import InvalidShardError

_F16_BYTES = 2
_MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS."""
_MAX_EXPERTS = 1024
"""LLAMA_MAX_EXPERTS."""
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_TOKENIZERS = ("llama", "gpt2", "t5", "gemma4", "plamo2", "plamo3", "no_vocab", "none")
"""Of generating models; `bert` aborts where it has to turn bytes to tokens."""


class ModelSizes(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes in a GGUF's header on which it depends how much memory the file takes when it is loaded."""

    weights_bytes: int
    kv_bytes_per_token: int
    """Key and value cache of one token in all layers of the file, at 16 bits."""
    n_embd: int
    n_head: int
    """Of attention."""
    feed_forward_length: int
    n_vocab: int
    """Rows of the embedding or output matrix; 0 for a slice that has neither."""
    n_tokens: int
    """Strings of the tokenizer; 0 for a slice that has none."""


def model_sizes(gguf: GgufFile) -> ModelSizes:
    """Raises InvalidShardError for a header that llama.cpp could not load."""
    header = Hyperparameters(gguf)
    header.check()
    n_layers, n_embd = header.one("block_count"), header.one("embedding_length")
    n_head = header.one("attention.head_count")
    head = n_embd // max(n_head, 1)
    head_bytes = _F16_BYTES * (header.one("attention.key_length", head) + header.one("attention.value_length", head))
    n_head_kv = sum(header.per_layer("attention.head_count_kv", n_layers, n_head))
    embeddings = (tensor for tensor in gguf.tensors if tensor.name in ("token_embd.weight", "output.weight"))
    vocabulary = gguf.metadata.get("tokenizer.ggml.tokens")
    return ModelSizes(
        weights_bytes=sum(tensor.size_bytes for tensor in gguf.tensors),
        kv_bytes_per_token=n_head_kv * head_bytes,
        n_embd=n_embd,
        n_head=n_head,
        feed_forward_length=header.one("feed_forward_length", 4 * n_embd),
        n_vocab=max((tensor.shape[-1] for tensor in embeddings), default=0),
        n_tokens=0 if vocabulary is None else vocabulary.count,
    )


class Hyperparameters:
    """Values under the architecture's prefix: `llama.block_count` is `one("block_count")`."""

    def __init__(self, gguf: GgufFile) -> None:
        self._gguf = gguf
        self._prefix = ""
        architecture = gguf.metadata.get("general.architecture")
        if architecture is None or not isinstance(architecture.value, str):
            raise InvalidShardError(f"{gguf.path.name} does not name its architecture (general.architecture)")
        self._prefix = f"{architecture.value}."

    def one(self, key: str, default: int | None = None) -> int:
        """A count; where it is given for each layer, the largest. Raises InvalidShardError without a default."""
        found = self._gguf.metadata.get(self._prefix + key)
        value = default if found is None else found.value
        values = value if isinstance(value, tuple) else (value,)
        numbers = [number for number in values if isinstance(number, int) and 0 <= number < 1 << 32]
        if not numbers or len(numbers) != len(values):
            raise self._refused(key, found, "a count")
        return max(numbers)

    def per_layer(self, key: str, n_layers: int, default: int) -> list[int]:
        """A count for each layer, whether the file gives one or many."""
        largest = self.one(key, default)
        found = self._gguf.metadata.get(self._prefix + key)
        if found is not None and isinstance(found.value, tuple):
            return [value for value in found.value if isinstance(value, int)]
        return [largest] * n_layers

    def check(self) -> None:
        """Raise InvalidShardError for values on which llama.cpp would abort."""
        n_layers = self.one("block_count")
        if not 1 <= n_layers <= _MAX_LAYERS:
            raise self._refused("block_count", self._found("block_count"), f"1 to {_MAX_LAYERS}")
        n_experts, n_used = self.one("expert_count", 0), self.one("expert_used_count", 0)
        if n_experts > _MAX_EXPERTS or n_used > n_experts or (n_experts > 0 and n_used == 0):
            raise self._refused(
                "expert_used_count", self._found("expert_used_count"), f"part of {n_experts} experts, at most 1024"
            )
        for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
            found = self._found(key)
            if found is not None and isinstance(found.value, float) and not 0 <= found.value < math.inf:
                raise self._refused(key, found, "not negative")
        scaling = self._found("rope.scaling.type")
        if scaling is not None and scaling.value not in _ROPE_SCALINGS:
            raise self._refused("rope.scaling.type", scaling, f"one of {', '.join(_ROPE_SCALINGS)}")
        tokenizer = self._gguf.metadata.get("tokenizer.ggml.model")
        if tokenizer is not None and tokenizer.value not in _TOKENIZERS:
            raise InvalidShardError(
                f"{self._gguf.path.name} has the tokenizer {tokenizer.value!r}; "
                f"models that generate have one of {', '.join(_TOKENIZERS)}"
            )

    def _found(self, key: str) -> GgufValue | None:
        return self._gguf.metadata.get(self._prefix + key)

    def _refused(self, key: str, found: GgufValue | None, wanted: str) -> InvalidShardError:
        given = "nothing" if found is None else str(found.value)[:80]
        return InvalidShardError(f"{self._gguf.path.name} gives {given} for {self._prefix}{key}: it must be {wanted}")
