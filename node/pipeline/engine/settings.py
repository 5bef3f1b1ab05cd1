"""How an engine is set up, and the constants that fix the shapes of its batches."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import InvalidParamsError

PREFILL_CHUNK = 32
"""Tokens of a prompt that go through the stages at a time.

The same bits come out only of the same batch shapes, so this is a constant of Shoal, not a setting. Larger chunks
are no faster for models of this size, and a first slice sets aside vocabulary x tokens x 4 bytes for a batch.
"""

_CTX_PADDING = 256
"""llama.cpp rounds a sequence's context up to this (`GGML_PAD(n_ctx_seq, 256)`)."""
_MAX_SESSIONS = 256
"""LLAMA_MAX_SEQ."""


@dataclass(frozen=True)
class EngineSettings:
    """One engine process."""

    threads: int = 1
    """Compute threads. Other numbers may give other bits: the same one everywhere where that matters."""
    threads_pinned_cpus: tuple[int, ...] | None = None
    """CPUs for the thread that makes the engine and for all that it starts; None: where the system puts them."""
    ctx_size: int = 4096
    """Tokens of one session, prompt and answer together."""
    max_sessions: int = 8
    gpu_layers: int = 0
    """Layers of each shard that go to a GPU, -1 for all; a wheel built for the CPU ignores it."""

    def __post_init__(self) -> None:
        for name, value, most in (
            ("threads", self.threads, 1024),
            ("ctx_size", self.ctx_size, 1 << 24),
            ("max_sessions", self.max_sessions, _MAX_SESSIONS),
        ):
            if not 1 <= value <= most:
                raise InvalidParamsError(f"{name} is {value}, allowed are 1 to {most}")

    @property
    def padded_ctx_size(self) -> int:
        """Positions that the KV cache of one session really has."""
        return -(-self.ctx_size // _CTX_PADDING) * _CTX_PADDING

    @property
    def batch_capacity(self) -> int:
        """Tokens that one `forward` takes: one chunk of a prompt, or a token of every session."""
        return max(PREFILL_CHUNK, self.max_sessions)
