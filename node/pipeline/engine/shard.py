"""One shard in llama.cpp, a slice or a whole model: its model and context, and the decode of a batch."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from node.pipeline.engine.batch import TokenBatch
from node.pipeline.engine.hidden_tap import HiddenTap
from node.pipeline.engine.llama import DECODE_NO_SLOT, DECODE_OK, LlamaBatch, library
from node.pipeline.engine.loaded_shard import LoadedShard
from node.pipeline.engine.log import take_problems
from node.pipeline.engine.settings import EngineSettings
from protocol.errors import ContextOverflowError, EngineError, InvalidShardError, ShoalError


class LlamaShard:
    """A shard's model and context in llama.cpp. `close` it; nothing may use it afterwards."""

    def __init__(self, path: Path, settings: EngineSettings, memory_bytes: int) -> None:
        self.name = path.name
        self._context: int | None = None
        self._model: int | None = None
        self._settings = settings
        self.model = self._load_model(path)
        try:
            self.info = self._describe(memory_bytes)
            self.tap: HiddenTap | None = None
            if not self.info.is_last:
                self.tap = HiddenTap(self.info.n_layers - 1, settings.batch_capacity, self.info.n_embd)
            self._make_context()
            self.incoming: NDArray[np.float32] = np.zeros((settings.batch_capacity, self.info.n_embd), np.float32)
            """[batch_capacity, n_embd]: the input of the next decode, if hidden states come from another stage."""
            self.incoming_address: int = self.incoming.ctypes.data
            self._batch = LlamaBatch()
            # After a decode the CPU caches hold weights: each object that is not touched saves microseconds.
            self._get_logits = library().llama_get_logits_ith
            self._llama_decode = library().llama_decode
            self._views: dict[int | None, NDArray[np.float32]] = {}
            self._warm_up()
        except ShoalError:
            self.close()
            raise

    def close(self) -> None:
        if self._context is not None:
            library().llama_free(self._context)
            self._context = None
        if self._model is not None:
            library().llama_model_free(self._model)
            self._model = None

    def decode(self, tokens: TokenBatch, hidden_address: int | None) -> None:
        """Decode the batch with this shard's layers.

        `hidden_address` is that of float32 [n, n_embd], for a shard that is not the first. The result is in
        `tap.rows`; on the last shard, `logits` returns it. Raises EngineError, ContextOverflowError; the caller then
        closes the sequences of the batch.
        """
        batch = self._batch
        batch.n_tokens = tokens.n
        if self.info.is_first:
            batch.token = tokens.token_address
        else:
            batch.embd = hidden_address
        batch.pos, batch.n_seq_id, batch.seq_id = tokens.pos_address, tokens.n_seq_id_address, tokens.seq_id_address
        tap = self.tap
        if tap is None:
            batch.logits = tokens.outputs_address
            self._decode(batch)
            return
        batch.logits = tokens.all_address  # the last layer drops every row that is not an output
        tap.expect(tokens.n, tokens.n_sequences)
        self._decode(batch)
        if not tap.copied():
            self._rewind(tokens)
            tap.expect(tokens.n, tokens.n_sequences)
            self._decode(batch)
            if not tap.copied():
                raise EngineError(
                    f"the graph of {self.name} has no node l_out-{self.info.n_layers - 1} of {tokens.n} rows: its "
                    f"architecture cannot run in slices with this llama.cpp; load the whole model on one node"
                )

    def logits(self, row: int) -> NDArray[np.float32]:
        """[n_vocab], a copy: of a token of the last batch that was marked as an output."""
        address = self._get_logits(self._context, row)
        view = self._views.get(address)
        if view is None:
            view = self._views[address] = self._view(address, row)
        return view.copy()

    def forget(self, sequence: int, position: int = 0) -> None:
        """Remove a sequence from the KV cache, from `position` on."""
        memory = library().llama_get_memory(self._context)
        library().llama_memory_seq_rm(memory, sequence, position, -1)

    def _decode(self, batch: LlamaBatch) -> None:
        result = self._llama_decode(self._context, batch)
        if result == DECODE_OK:
            return
        if result == DECODE_NO_SLOT:
            raise ContextOverflowError(
                f"a session needs more than its {self._settings.ctx_size} tokens of context in {self.name}"
            )
        raise EngineError(
            f"llama.cpp could not decode {batch.n_tokens} tokens with {self.name} (llama_decode: {result}): "
            f"{take_problems() or 'it gave no reason'}"
        )

    def _view(self, address: int | None, row: int) -> NDArray[np.float32]:
        """The library's own row of logits; its address changes if the buffer grows."""
        if not address:
            raise EngineError(f"{self.name} has no logits for token {row} of its last batch")
        if len(self._views) >= 2 * self._settings.batch_capacity:
            self._views.clear()
        return np.ctypeslib.as_array((ctypes.c_float * self.info.n_vocab).from_address(address))

    def _rewind(self, tokens: TokenBatch) -> None:
        for sequence, position in tokens.starts:
            self.forget(sequence, position)

    def _load_model(self, path: Path) -> int:
        lib = library()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = self._settings.gpu_layers
        take_problems()
        model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise InvalidShardError(f"llama.cpp cannot load {path.name}: {take_problems() or 'it gave no reason'}")
        self._model = model
        return int(model)

    def _describe(self, memory_bytes: int) -> LoadedShard:
        lib, model = library(), self.model
        n_layers, n_embd = lib.llama_model_n_layer(model), lib.llama_model_n_embd(model)
        if (
            lib.llama_model_has_encoder(model)
            or lib.llama_model_is_recurrent(model)
            or lib.llama_model_is_hybrid(model)
        ):
            raise EngineError(f"{self.name} has an encoder or recurrent layers; only decoders with attention can run")
        if lib.llama_model_n_embd_inp(model) != n_embd:
            raise EngineError(
                f"the layers of {self.name} take more than the hidden state (deep-stacked inputs); it cannot run"
            )
        start = self._metadata_int("shoal.shard.start_layer")
        end = self._metadata_int("shoal.shard.end_layer")
        total = self._metadata_int("shoal.model.n_layers")
        if start is None or end is None or total is None:
            start, end, total = 0, n_layers, n_layers
        if not (0 <= start < end <= total and end - start == n_layers):
            raise InvalidShardError(
                f"{self.name} says that it holds layers [{start}, {end}) of {total}, but has {n_layers} layers"
            )
        return LoadedShard(
            start_layer=start,
            end_layer=end,
            n_embd=n_embd,
            n_vocab=lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)),
            is_first=start == 0,
            is_last=end == total,
            memory_bytes=memory_bytes,
        )

    def _metadata_int(self, key: str) -> int | None:
        buffer = ctypes.create_string_buffer(32)
        n = library().llama_model_meta_val_str(self.model, key.encode(), buffer, len(buffer))
        if n < 0:
            return None
        try:
            return int(buffer.value)
        except ValueError:
            raise InvalidShardError(f"{self.name}: {key} is {buffer.value[:30]!r}, not a number") from None

    def _make_context(self) -> None:
        lib, settings = library(), self._settings
        params = lib.llama_context_default_params()
        params.n_batch = params.n_ubatch = settings.batch_capacity
        params.n_threads = params.n_threads_batch = settings.threads
        # Every sequence has a cache of its own, not cells among those of others. Attention over a session then
        # reads its own cells in the order of its own tokens, so a session decoded alone gives the same bits
        # whatever others have cached, with every attention kernel (in a unified cache, and without flash
        # attention, logits of SmolLM2 were 0.57 apart), its speed is its own, and none takes another's room.
        params.kv_unified = False
        params.n_seq_max = settings.max_sessions
        params.n_ctx = settings.padded_ctx_size * settings.max_sessions
        # Layers with a sliding window keep the window only; a session never goes back.
        params.swa_full = False
        if self.tap is not None:
            params.cb_eval = ctypes.cast(self.tap.callback, ctypes.c_void_p).value
        take_problems()
        self._context = lib.llama_init_from_model(self.model, params)
        if not self._context:
            raise EngineError(
                f"llama.cpp cannot make a context for {self.name} with {settings.max_sessions} sessions of "
                f"{settings.ctx_size} tokens: {take_problems() or 'it gave no reason'}"
            )
        if lib.llama_n_ctx_seq(self._context) != settings.padded_ctx_size:
            raise EngineError(
                f"llama.cpp gives each session of {self.name} {lib.llama_n_ctx_seq(self._context)} positions, "
                f"not the {settings.padded_ctx_size} that were asked for"
            )

    def _warm_up(self) -> None:
        """Decode one token: reads the weights in, and fails now if the architecture cannot run in slices."""
        tokens = TokenBatch(1)
        tokens.begin()
        tokens.add_token(0, 0, wanted=True)
        self.decode(tokens, self.incoming_address)
        self.forget(0)
