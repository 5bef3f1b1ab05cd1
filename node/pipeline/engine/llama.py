"""The C functions and structs of llama.cpp that a stage calls, as the pinned `xllamacpp` wheel exports them.

This is the only module that loads the library or knows its layout. The declarations follow `include/llama.h` in
the source distribution of that one version. Another version, or other defaults in the parameter structs, is refused
before any function that takes one of these structs is called.

OpenMP reads its thread policy (`OMP_WAIT_POLICY`, `OMP_NUM_THREADS`) from the environment when the library is
loaded: the daemon sets it when it starts the engine process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from ctypes import c_bool, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from node.pipeline.engine import log as engine_log
from protocol.errors import UnsupportedPlatformError

WHEEL = "xllamacpp"
WHEEL_VERSION = "2026.10.11549"

RANDOM_SEED = 0xFFFFFFFF
"""LLAMA_DEFAULT_SEED: with it a sampler takes its seed from the machine's entropy."""
DECODE_OK = 0
DECODE_NO_SLOT = 1
"""The KV cache has no room for the batch."""

_c_enum = ctypes.c_int
_LogCallback = ctypes.CFUNCTYPE(None, _c_enum, c_char_p, c_void_p)
_AbortCallback = ctypes.CFUNCTYPE(None, c_char_p)
NodeCallback = ctypes.CFUNCTYPE(c_bool, c_void_p)
"""`ggml_backend_sched_eval_callback` with the first of its three arguments only.

The caller passes `(tensor, ask, user_data)`; in the calling conventions of x86-64 and AArch64 a callee may ignore
trailing arguments, and converting them would double the cost of a call that is made for every node.
"""


class ModelParams(ctypes.Structure):
    """`struct llama_model_params`."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", _c_enum),
        ("load_mode", _c_enum),
        ("lazy_mode", _c_enum),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class ContextParams(ctypes.Structure):
    """`struct llama_context_params`."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", _c_enum),
        ("rope_scaling_type", _c_enum),
        ("pooling_type", _c_enum),
        ("attention_type", _c_enum),
        ("flash_attn_type", _c_enum),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", _c_enum),
        ("type_v", _c_enum),
        ("moe_cache_size", c_size_t),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class LlamaBatch(ctypes.Structure):
    """`struct llama_batch`; Python owns the arrays, so the fields are plain addresses."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", c_void_p),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    ]


class TokenDataArray(ctypes.Structure):
    """`llama_token_data_array`; `data` holds `size` rows of (int32 id, float logit, float p)."""

    _fields_ = [("data", c_void_p), ("size", c_size_t), ("selected", c_int64), ("sorted", c_bool)]


class ChainParams(ctypes.Structure):
    """`llama_sampler_chain_params`."""

    _fields_ = [("no_perf", c_bool)]


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    # name: (result, arguments...)
    "llama_backend_init": (None,),
    "llama_log_set": (None, _LogCallback, c_void_p),
    "ggml_set_abort_callback": (c_void_p, _AbortCallback),
    "llama_model_default_params": (ModelParams,),
    "llama_context_default_params": (ContextParams,),
    "llama_model_load_from_file": (c_void_p, c_char_p, ModelParams),
    "llama_model_free": (None, c_void_p),
    "llama_init_from_model": (c_void_p, c_void_p, ContextParams),
    "llama_free": (None, c_void_p),
    "llama_model_n_embd": (c_int32, c_void_p),
    "llama_model_n_embd_inp": (c_int32, c_void_p),
    "llama_model_n_layer": (c_int32, c_void_p),
    "llama_model_size": (c_uint64, c_void_p),
    "llama_model_has_encoder": (c_bool, c_void_p),
    "llama_model_is_recurrent": (c_bool, c_void_p),
    "llama_model_is_hybrid": (c_bool, c_void_p),
    "llama_model_meta_val_str": (c_int32, c_void_p, c_char_p, c_char_p, c_size_t),
    "llama_model_chat_template": (c_char_p, c_void_p, c_char_p),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_type": (_c_enum, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_vocab_bos": (c_int32, c_void_p),
    "llama_vocab_eos": (c_int32, c_void_p),
    "llama_vocab_get_add_bos": (c_bool, c_void_p),
    "llama_vocab_get_text": (c_char_p, c_void_p, c_int32),
    "llama_vocab_is_eog": (c_bool, c_void_p, c_int32),
    "llama_tokenize": (c_int32, c_void_p, c_char_p, c_int32, c_void_p, c_int32, c_bool, c_bool),
    "llama_token_to_piece": (c_int32, c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool),
    "llama_decode": (c_int32, c_void_p, LlamaBatch),
    "llama_get_logits_ith": (c_void_p, c_void_p, c_int32),
    "llama_n_ctx_seq": (c_uint32, c_void_p),
    "llama_get_memory": (c_void_p, c_void_p),
    "llama_memory_seq_rm": (c_bool, c_void_p, c_int32, c_int32, c_int32),
    "llama_sampler_chain_init": (c_void_p, ChainParams),
    "llama_sampler_chain_add": (None, c_void_p, c_void_p),
    "llama_sampler_init_top_k": (c_void_p, c_int32),
    "llama_sampler_init_top_p": (c_void_p, c_float, c_size_t),
    "llama_sampler_init_min_p": (c_void_p, c_float, c_size_t),
    "llama_sampler_init_temp": (c_void_p, c_float),
    "llama_sampler_init_dist": (c_void_p, c_uint32),
    "llama_sampler_apply": (None, c_void_p, ctypes.POINTER(TokenDataArray)),
    "llama_sampler_free": (None, c_void_p),
    "ggml_get_name": (c_char_p, c_void_p),
    "ggml_nbytes": (c_size_t, c_void_p),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
}

# What the two functions of defaults return in this version. A field of another size or offset would shift the fields
# behind it, so every part of each struct has a value here that is not zero.
_MODEL_DEFAULTS = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "tensor_split": None,
    "kv_overrides": None,
    "vocab_only": False,
    "use_extra_bufts": True,
    "no_host": False,
    "load_mtp": False,
}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "type_k": 1,
    "type_v": 1,
    "moe_cache_size": 0,
    "abort_callback": None,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "samplers": None,
    "n_samplers": 0,
    "ctx_other": None,
}

_log_callback = _LogCallback(engine_log.on_log)
_abort_callback = _AbortCallback(engine_log.on_abort)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library with every function declared and its log sent to Python's.

    Raises UnsupportedPlatformError if the wheel is missing, has another version, lacks a function, or returns other
    defaults than the pinned version.
    """
    lib = _open(_find())
    missing = [name for name in _SIGNATURES if not hasattr(lib, name)]
    if missing:
        raise UnsupportedPlatformError(f"{WHEEL} {WHEEL_VERSION} on this machine lacks {', '.join(missing)}")
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_log_callback, None)
    lib.ggml_set_abort_callback(_abort_callback)
    lib.llama_backend_init()
    check_defaults(lib.llama_model_default_params(), _MODEL_DEFAULTS)
    check_defaults(lib.llama_context_default_params(), _CONTEXT_DEFAULTS)
    return lib


def check_defaults(params: ctypes.Structure, expected: Mapping[str, object]) -> None:
    """Raise UnsupportedPlatformError if a field of a parameter struct does not have its expected value."""
    found = {name: getattr(params, name) for name in expected}
    wrong = {name: value for name, value in found.items() if value != expected[name]}
    if wrong:
        raise UnsupportedPlatformError(
            f"the llama.cpp library of {WHEEL} has another layout than version {WHEEL_VERSION}: "
            f"{type(params).__name__} defaults to {wrong}; install {WHEEL}=={WHEEL_VERSION}"
        )


def _find() -> Path:
    try:
        found = importlib.metadata.version(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedPlatformError(
            f"the wheel {WHEEL}=={WHEEL_VERSION} is not installed; it has builds for Linux and macOS on 64 bits"
        ) from None
    if found.partition("+")[0] != WHEEL_VERSION:  # builds for GPUs append a local version
        raise UnsupportedPlatformError(
            f"{WHEEL} {found} is installed, only {WHEEL_VERSION} works; install {WHEEL}=={WHEEL_VERSION}"
        )
    spec = importlib.util.find_spec(WHEEL)  # does not import it: the package's own module is not needed
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in sorted(Path(folder).glob(f"{WHEEL}*.so")):
            return path
    raise UnsupportedPlatformError(f"the installed {WHEEL} {found} contains no library; install it again")


def _open(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as err:
        raise UnsupportedPlatformError(f"cannot load {path.name} of {WHEEL} {WHEEL_VERSION}: {err}") from None
