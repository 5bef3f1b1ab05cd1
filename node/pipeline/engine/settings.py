"""The settings of an engine, and the constants that fix the shapes of its batches."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import InvalidParamsError

PREFILL_CHUNK = 32
"""Tokens of one chunk of a prefill.

Only the same batch shapes give the same bits, so this is a constant of Shoal, not a setting. Larger chunks are not
faster for models of this size, and a first slice reserves vocabulary x tokens x 4 bytes for a batch.
"""

_CTX_PADDING = 256
"""llama.cpp rounds a sequence's context up to this (`GGML_PAD(n_ctx_seq, 256)`)."""
_MAX_SESSIONS = 256
"""LLAMA_MAX_SEQ."""


@dataclass(frozen=True)
class EngineSettings:
    """One engine process."""

    threads: int = 1
    """Compute threads. Another number may give other bits: use the same on all nodes if that matters."""
    threads_pinned_cpus: tuple[int, ...] | None = None
    """CPUs for the thread that makes the engine and for all that it starts; None: the system chooses."""
    ctx_size: int = 4096
    """Tokens of one session, prompt and answer together."""
    max_sessions: int = 8
    """Sessions open at once; each has a KV cache of its own."""
    gpu_layers: int = 0
    """Layers of each shard that a GPU computes, -1 for all; a wheel built for the CPU ignores it."""

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
        """Positions in the KV cache of one session."""
        return -(-self.ctx_size // _CTX_PADDING) * _CTX_PADDING

    @property
    def batch_capacity(self) -> int:
        """Tokens of one `forward`: one chunk of a prompt, or a token of every session."""
        return max(PREFILL_CHUNK, self.max_sessions)
