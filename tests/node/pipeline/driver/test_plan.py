"""Who runs which shard."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.pipeline.driver.plan import NodeShards, Plan, plan_pipeline
from protocol.errors import InsufficientMemoryError, InvalidParamsError, NoSourceError
from protocol.ids import ContentId, NodeId
from protocol.manifest import Manifest, ModelInfo, ShardEntry

SHARD_BYTES = 100


def model(n_shards: int, layers_each: int = 5, kv: int = 0) -> Manifest:
    return Manifest(
        name="m",
        kind="model",
        shards=tuple(
            ShardEntry(
                shard_id=i,
                filename=f"shard-{i}.gguf",
                size=SHARD_BYTES,
                content_id=ContentId("0" * 64),
                kind="gguf",
                start_layer=i * layers_each,
                end_layer=(i + 1) * layers_each,
            )
            for i in range(n_shards)
        ),
        model=ModelInfo(
            architecture="llama",
            n_layers=n_shards * layers_each,
            n_embd=8,
            context_length=128,
            kv_bytes_per_token_layer=kv,
        ),
    )


def node(name: str, on_disk: str = "", loaded: str = "", memory: int | None = None) -> NodeShards:
    return NodeShards(NodeId(name), frozenset(map(int, on_disk)), frozenset(map(int, loaded)), memory)


def stages(plan: Plan) -> list[tuple[str, tuple[int, ...]]]:
    return [(stage.node_id, stage.shards) for stage in plan.stages]


def test_loaded_goes_before_on_disk() -> None:
    plan = plan_pipeline(model(3), [node("a", "012"), node("b", loaded="1", on_disk="1")])
    assert stages(plan) == [("a", (0,)), ("b", (1,)), ("a", (2,))]
    assert [(load.node_id, load.shard_id, load.on_disk) for load in plan.to_load] == [("a", 0, True), ("a", 2, True)]


def test_contiguous_runs_are_one_stage_with_their_layers() -> None:
    plan = plan_pipeline(model(4), [node("a", loaded="01"), node("b", loaded="23")])
    assert stages(plan) == [("a", (0, 1)), ("b", (2, 3))]
    assert [stage.layers for stage in plan.stages] == [(0, 10), (10, 20)]
    assert plan.to_load == ()
    assert plan.nodes() == ("a", "b")


def test_where_several_have_a_shard_the_longest_run_wins() -> None:
    plan = plan_pipeline(model(4), [node("a", loaded="0"), node("b", loaded="0123"), node("c", loaded="12")])
    assert stages(plan) == [("b", (0, 1, 2, 3))]


def test_missing_shards_are_spread_evenly_in_runs() -> None:
    plan = plan_pipeline(model(6), [node("c"), node("a"), node("b")])
    assert stages(plan) == [("a", (0, 1)), ("b", (2, 3)), ("c", (4, 5))]
    assert not any(load.on_disk for load in plan.to_load)
    uneven = plan_pipeline(model(4), [node("a"), node("b"), node("c")])
    assert stages(uneven) == [("a", (0, 1)), ("b", (2,)), ("c", (3,))]


def test_missing_shards_join_the_runs_beside_them() -> None:
    plan = plan_pipeline(model(6), [node("a", loaded="5"), node("b", loaded="0"), node("c")])
    assert stages(plan) == [("b", (0, 1)), ("c", (2, 3)), ("a", (4, 5))]
    plan = plan_pipeline(model(6), [node("a", loaded="5"), node("b", loaded="012"), node("c")])
    assert stages(plan) == [("b", (0, 1, 2)), ("c", (3,)), ("a", (4, 5))]


def test_a_node_without_room_is_passed_over_even_with_the_file() -> None:
    plan = plan_pipeline(model(4), [node("a", "0123", memory=2 * SHARD_BYTES), node("b", memory=5 * SHARD_BYTES)])
    assert stages(plan) == [("a", (0, 1)), ("b", (2, 3))]


def test_the_cache_counts() -> None:
    small = [node("a", memory=4 * SHARD_BYTES)]
    assert len(plan_pipeline(model(4, kv=1), small).stages) == 1
    with pytest.raises(InsufficientMemoryError, match="shard 0 needs about 600 bytes") as caught:
        plan_pipeline(model(4, kv=1), small, context_tokens=100)
    assert caught.value.details["available_bytes"] == {"a": 400}


def test_lost_nodes_are_left_out() -> None:
    nodes = [node("a", loaded="0"), node("b", loaded="1"), node("c")]
    plan = plan_pipeline(model(2), nodes, without=[NodeId("b")])
    assert stages(plan) == [("a", (0,)), ("c", (1,))]
    with pytest.raises(NoSourceError, match="no node"):
        plan_pipeline(model(2), nodes, without=[NodeId("a"), NodeId("b"), NodeId("c")])


def test_what_is_no_model_is_refused() -> None:
    loose = Manifest(
        name="x",
        kind="file",
        shards=(ShardEntry(shard_id=0, filename="x", size=1, content_id=ContentId("0" * 64), kind="file"),),
    )
    with pytest.raises(InvalidParamsError, match="not a model"):
        plan_pipeline(loose, [node("a")])


shard_sets = st.frozensets(st.integers(0, 11))


@given(
    st.integers(1, 12),
    st.lists(st.tuples(shard_sets, shard_sets), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_every_plan_is_whole_and_does_not_depend_on_order(
    n_shards: int, held: list[tuple[frozenset[int], frozenset[int]]], rng: random.Random
) -> None:
    nodes = [NodeShards(NodeId(f"n{i}"), disk | loaded, loaded) for i, (disk, loaded) in enumerate(held)]
    plan = plan_pipeline(model(n_shards), nodes)
    shuffled = list(nodes)
    rng.shuffle(shuffled)
    assert plan == plan_pipeline(model(n_shards), shuffled)
    assert [shard for stage in plan.stages for shard in stage.shards] == list(range(n_shards))
    assert all(a.node_id != b.node_id for a, b in zip(plan.stages, plan.stages[1:], strict=False))
    assert all(a.layers[1] == b.layers[0] for a, b in zip(plan.stages, plan.stages[1:], strict=False))
    by_id = {known.node_id: known for known in nodes}
    loads = {(load.node_id, load.shard_id) for load in plan.to_load}
    for stage in plan.stages:
        for shard in stage.shards:
            here = by_id[stage.node_id]
            assert ((stage.node_id, shard) in loads) == (shard not in here.loaded)
            if any(shard in known.loaded for known in nodes):
                assert shard in here.loaded
            elif any(shard in known.on_disk for known in nodes):
                assert shard in here.on_disk


@given(st.integers(1, 20), st.integers(1, 6))
def test_the_spread_is_even(n_shards: int, n_nodes: int) -> None:
    plan = plan_pipeline(model(n_shards), [NodeShards(NodeId(f"n{i}")) for i in range(n_nodes)])
    counts = [len(stage.shards) for stage in plan.stages]
    assert len(counts) == min(n_nodes, n_shards)
    assert max(counts) - min(counts) <= 1
