"""What a loaded shard is: one record, from the engine through its process to the daemon."""

from __future__ import annotations

import msgspec


class LoadedShard(msgspec.Struct, frozen=True, tag=True):
    """A shard as llama.cpp found it; the engine process sends it to the daemon as it is."""

    start_layer: int
    """In the whole model's numbering."""
    end_layer: int
    """One past the last."""
    n_embd: int
    """Values in the hidden state of a token."""
    n_vocab: int
    """Rows of the embedding; of a dummy one in a slice from the middle."""
    is_first: bool
    """Takes tokens; the others take hidden states."""
    is_last: bool
    """Gives logits; the others give hidden states."""
    memory_bytes: int
    """Estimated (node.pipeline.engine.memory)."""

    @property
    def n_layers(self) -> int:
        """Layers in this shard."""
        return self.end_layer - self.start_layer
