from __future__ import annotations

import io
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from node.formats.kinds import check_shard, kind_of
from node.formats.parquet import check_parquet
from protocol.errors import InvalidShardError
from tests.support.gguf.gguf_bytes import gguf, string_entry, u32_entry


def table_bytes(rows: int = 1000) -> bytes:
    table = pa.table({"number": list(range(rows)), "text": [f"row {n}" for n in range(rows)]})
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=200)
    return out.getvalue()


WHOLE = table_bytes()
FOOTER = struct.unpack("<I", WHOLE[-8:-4])[0]


def check(folder: Path, raw: bytes) -> None:
    path = folder / "data.parquet"
    path.write_bytes(raw)
    check_parquet(path)


def test_whole_file_passes(tmp_path: Path) -> None:
    check(tmp_path, WHOLE)
    assert check_shard(tmp_path / "data.parquet") == 1000
    (tmp_path / "data.parquet").write_bytes(table_bytes(0))
    assert check_shard(tmp_path / "data.parquet") == 0
    check(tmp_path, table_bytes(0))


BAD = {
    "empty": (b"", "truncated: 0 bytes"),
    "only magic": (b"PAR1PAR1", "truncated"),
    "something else": (b"x" * 100, "not a parquet file"),
    "cut in the data": (WHOLE[:2000], "truncated: it begins as"),
    "cut by one byte": (WHOLE[:-1], "truncated: it begins as"),
    "footer of no bytes": (WHOLE[:-8] + struct.pack("<I", 0) + b"PAR1", "footer is said to have 0"),
    "footer of 4 GiB": (WHOLE[:-8] + struct.pack("<I", 2**32 - 1) + b"PAR1", "footer is said"),
    "footer beyond the start": (WHOLE[:-8] + struct.pack("<I", len(WHOLE) - 11) + b"PAR1", "footer is said"),
    "footer of zeros": (WHOLE[: -8 - FOOTER] + bytes(FOOTER) + WHOLE[-8:], "footer cannot be read"),
    "encrypted": (WHOLE[:-4] + b"PARE", "encrypted"),
    "data cut out of the middle": (b"PAR1" + WHOLE[-8 - FOOTER :], "lies at bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    raw, reason = BAD[name]
    with pytest.raises(InvalidShardError, match=reason) as caught:
        check(tmp_path, raw)
    assert "data.parquet" in caught.value.message


CHECK_ALL = """
import sys
from pathlib import Path
from node.formats.parquet import check_parquet
from protocol.errors import InvalidShardError
for line in sys.stdin:
    path = Path(line.strip())
    try:
        check_parquet(path)
        said = "whole"
    except InvalidShardError as err:
        said = "refused" if path.name in err.message else "not named"
    print(path.name, said, flush=True)
"""


def test_damaged_footers_are_refused_or_read_or_end_the_process_that_reads_them(tmp_path: Path) -> None:
    """pyarrow lets C++ exceptions through for some: this is why a node reads shards in a process of their own."""
    paths = []
    for seed in range(1000, 1600):
        rng, raw = random.Random(seed), bytearray(WHOLE)
        for _ in range(rng.randint(1, 5)):
            raw[rng.randint(len(raw) - 8 - FOOTER, len(raw) - 1)] = rng.randint(0, 255)
        paths.append(tmp_path / f"{seed}.parquet")
        paths[-1].write_bytes(raw)
    said: dict[str, str] = {}
    aborted = 0
    while len(said) < len(paths):
        left = "\n".join(str(path) for path in paths[len(said) :])
        ended = subprocess.run(
            [sys.executable, "-c", CHECK_ALL], input=left, capture_output=True, text=True, timeout=50, check=False
        )
        said |= dict(line.split(" ", 1) for line in ended.stdout.splitlines())
        if ended.returncode:
            assert ended.returncode == -signal.SIGABRT, ended.stderr[-2000:]
            assert "ParquetException" in ended.stderr
            said[paths[len(said)].name] = "aborted"
            aborted += 1
    assert aborted < 5
    assert set(said.values()) <= {"whole", "refused", "aborted"}
    assert list(said.values()).count("refused") > 100


def test_kinds_follow_names_and_decide_the_check(tmp_path: Path) -> None:
    assert [kind_of(Path(name)) for name in ("a.gguf", "A.GGUF", "b.parquet", "c.bin", "gguf")] == [
        "gguf",
        "gguf",
        "parquet",
        "file",
        "file",
    ]
    (tmp_path / "video.mp4").write_bytes(b"x")
    check_shard(tmp_path / "video.mp4")
    for name, raw in (("empty.bin", b""), ("bad.gguf", b"GGUF"), ("bad.parquet", b"PAR1")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(InvalidShardError, match=name):
            check_shard(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(InvalidShardError, match="regular"):
        check_shard(tmp_path / "pipe.bin")
    (tmp_path / "model.gguf").write_bytes(gguf([string_entry("general.architecture", "llama")]))
    check_shard(tmp_path / "model.gguf")
    (tmp_path / "slice.gguf").write_bytes(gguf([u32_entry("shoal.shard.start_layer", 3)]))
    with pytest.raises(InvalidShardError, match="lacks"):
        check_shard(tmp_path / "slice.gguf")
