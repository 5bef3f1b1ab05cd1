"""Which layers go into which shard: pure arithmetic over a header."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from node.formats.architectures import ArchitectureRule, rule_of
from node.formats.gguf_file import GgufFile
from node.formats.slices import block_of
from protocol.errors import IllegalCutError, InvalidParamsError, InvalidShardError

MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class Cuttable:
    """A model, and the layers before which it may be cut."""

    n_layers: int
    """Layers that generate: those of multi-token prediction (nextn) are not counted."""
    layer_bytes: tuple[int, ...]
    """Tensor bytes of each layer."""
    legal: tuple[int, ...]
    """Layers that may begin a shard, 0 left out; ascending."""
    reason: str
    """Why others may not; empty if all may."""
    rule: ArchitectureRule

    def even(self, shards: int) -> tuple[int, ...]:
        """Boundaries (0 and n_layers among them) of `shards` parts, as even in bytes of layers as legal cuts allow.

        Each cut is at the legal layer nearest to an even share of what is left.

        Raises InvalidParamsError for fewer than one shard, IllegalCutError for more than the legal cuts allow.
        """
        if shards < 1:
            raise InvalidParamsError(f"a model is cut into 1 shard or more, not {shards}")
        if shards > len(self.legal) + 1:
            raise IllegalCutError(
                f"cannot cut into {shards} shards: {self._why()}; ask for at most {len(self.legal) + 1} shards",
                {"legal": list(self.legal), "most_shards": len(self.legal) + 1},
            )
        before = [0, *accumulate(self.layer_bytes)]
        offsets = [before[layer] for layer in self.legal]
        chosen: list[int] = []
        low = done = 0
        for left in range(shards, 1, -1):
            high = len(offsets) - (left - 2)  # leave a cut for each part to come
            goal = done + (before[-1] - done) // left
            at = min(max(bisect_left(offsets, goal), low), high - 1)
            if at > low and goal - offsets[at - 1] <= offsets[at] - goal:
                at -= 1
            chosen.append(self.legal[at])
            low, done = at + 1, offsets[at]
        return self._checked((0, *chosen, self.n_layers))

    def at(self, cuts: Sequence[int]) -> tuple[int, ...]:
        """Boundaries for cuts before the given layers; IllegalCutError, naming the legal ones, if one is not."""
        wrong = sorted(set(cuts) - set(self.legal))
        if wrong or list(cuts) != sorted(set(cuts)):
            asked = ", ".join(str(cut) for cut in cuts)
            raise IllegalCutError(
                f"cannot cut before layers {asked}: {self._why()}",
                {"legal": list(self.legal), "illegal": wrong, "n_layers": self.n_layers},
            )
        return self._checked((0, *cuts, self.n_layers))

    def _checked(self, boundaries: tuple[int, ...]) -> tuple[int, ...]:
        for start, end in pairwise(boundaries):
            if len(boundaries) > 2 and end - start in self.rule.refused_lengths:
                raise IllegalCutError(
                    f"a shard of the {end - start} layers from {start} on would be taken for another model by "
                    f"llama.cpp, which tells models of this architecture apart by their number of layers; "
                    f"ask for another number of shards",
                    {"legal": list(self.legal), "refused_lengths": list(self.rule.refused_lengths)},
                )
        return boundaries

    def _why(self) -> str:
        legal = ", ".join(str(cut) for cut in self.legal) or "none"
        reason = f" ({self.reason})" if self.reason else ""
        return f"legal cuts of these {self.n_layers} layers are before {legal}{reason}"


def cuttable(gguf: GgufFile) -> Cuttable:
    """Find the layers before which a model may be cut.

    A model whose architecture forbids every cut has no legal ones, and a reason: it can still be one shard.
    Raises InvalidShardError if the header is not a complete model's: no layers, missing or surplus blocks.
    """
    arch = gguf.architecture
    all_layers = gguf.integer(f"{arch}.block_count")
    if all_layers is None or not 0 < all_layers <= MAX_LAYERS:
        raise InvalidShardError(f"{gguf.path.name}: {arch}.block_count is {all_layers}, it must be 1 to {MAX_LAYERS}")
    predicted = gguf.integer(f"{arch}.nextn_predict_layers") or 0
    n_layers = all_layers - predicted
    if predicted < 0 or n_layers < 1:
        raise InvalidShardError(f"{gguf.path.name}: {predicted} of {all_layers} layers predict further tokens")
    layer_bytes = [0] * all_layers
    for tensor in gguf.tensors:
        block = block_of(tensor)
        if block is None:
            continue
        if block[0] >= all_layers:
            raise InvalidShardError(f"{gguf.path.name} has {all_layers} layers and a tensor {tensor.name!r}")
        layer_bytes[block[0]] += tensor.size_bytes
    if missing := [layer for layer in range(n_layers) if not layer_bytes[layer]]:
        raise InvalidShardError(
            f"{gguf.path.name} has {n_layers} layers but no tensors of layer {missing[0]}: it is not a whole model"
        )
    rule = rule_of(gguf, n_layers)
    legal = tuple(range(rule.period, n_layers, rule.period)) if rule.period else ()
    return Cuttable(n_layers, tuple(layer_bytes[:n_layers]), legal, rule.reason, rule)
