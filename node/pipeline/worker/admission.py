"""Whether a stage can take a session: pure checks of what OPEN_SESSION asks against what is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from node.pipeline.worker.interfaces import ShardFacts
from protocol.commands.sessions import OpenSessionParams
from protocol.errors import ContextOverflowError, InvalidParamsError, ShardNotLoadedError


def check_opening(params: OpenSessionParams, loaded: Mapping[int, ShardFacts], ctx_size: int) -> None:
    """Raise ShardNotLoadedError, InvalidParamsError or ContextOverflowError where the session cannot run here."""
    shards = list(params.shards)
    missing = [shard_id for shard_id in shards if shard_id not in loaded]
    if missing:
        raise ShardNotLoadedError(f"shards {missing} are not loaded here; LOAD_SHARD them first", {"shards": missing})
    if params.stage >= params.n_stages or shards != list(range(shards[0], shards[0] + len(shards))):
        raise InvalidParamsError(
            f"stage {params.stage} of {params.n_stages} with shards {shards} is no run of a pipeline"
        )
    ends = (loaded[shards[0]].is_first, loaded[shards[-1]].is_last)
    if ends != (params.stage == 0, params.stage == params.n_stages - 1):
        raise InvalidParamsError(
            f"shards {shards} cannot be stage {params.stage} of {params.n_stages}: the first stage begins with the "
            "model's first shard, the last ends with its last"
        )
    if params.n_positions > ctx_size:
        raise ContextOverflowError(
            f"prompt and answer take up to {params.n_positions} tokens, a stage here has room for {ctx_size}; shorten "
            "the prompt, lower max_tokens, or start the node with a larger --ctx-size",
            {"needed": params.n_positions, "ctx_size": ctx_size},
        )
