"""What a person types, and what comes back: text, JSON, exit status."""

from __future__ import annotations

import asyncio
import importlib.metadata
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from node.cli import main
from node.files import Fingerprint
from node.shards.pins import Pins
from node.shards.store.catalog import ShardFile
from protocol.content import hash_file
from protocol.signing import SigningKey
from tests.support.cli_node import NODE, PIECES, SET, FakeNode, fake_node
from tests.support.gguf.tiny_gguf import write_tiny_gguf

COMMANDS = (
    "serve",
    "split",
    "publish",
    "pull",
    "files",
    "unpin",
    "evict",
    "verify",
    "call",
    "nodes",
    "status",
    "generate",
    "check-o3",
    "demo",
)


class Said(NamedTuple):
    code: int
    out: str
    err: str


Shoal = Callable[..., Said]


@pytest.fixture
def shoal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shoal:
    """Types a command line into a bare environment, 80 columns wide."""
    for name in [name for name in os.environ if name.startswith(("SHOAL_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")

    def run(*argv: object) -> Said:
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in argv])
        code = ended.value.code
        assert isinstance(code, int)
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def node() -> Iterator[FakeNode]:
    with fake_node() as running:
        yield running


def parquet(path: Path, rows: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"n": list(range(rows))}), path)
    return path


# Help and mistakes


def test_help_lists_the_commands_each_in_one_line(shoal: Shoal) -> None:
    said = shoal("--help")
    assert said.code == 0
    for command in COMMANDS:
        (line,) = [line for line in said.out.splitlines() if line.startswith(f"  {command} ")]
        assert not line.endswith("..."), "the summary is cut off"
    assert shoal("-h") == said


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples_that_can_be_typed(shoal: Shoal, command: str) -> None:
    said = shoal(command, "--help")
    assert said.code == 0
    _, _, below = said.out.partition("Examples:\n")
    assert f"    shoal {'' if command == 'serve' else command}" in below
    options = said.out[said.out.index("Options:") :].partition("Examples:")[0]
    assert max(map(len, options.splitlines())) <= 80


def test_the_version_is_told(shoal: Shoal) -> None:
    assert shoal("--version") == (0, f"shoal {importlib.metadata.version('shoal')}\n", "")


def test_help_of_serve_names_environment_and_file(shoal: Shoal) -> None:
    out = shoal("serve", "--help").out
    for word in ("SHOAL_RPC_PORT", "SHOAL_CONFIG", "config.toml", 'upload_limit = "8MB"', "--insecure-listen"):
        assert word in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["frobnicate"], ["frobnicate", "generate", "serve"]),
        (["--bogus", "1"], ["--bogus"]),
        (["--rpc-port", "70000"], ["rpc_port = 70000", "65535"]),
        (["--listen", "0.0.0.0"], ["--insecure-listen"]),
        (["--config", "/no/such.toml"], ["/no/such.toml"]),
        (["call", "nowhere", "STATUS"], ["nowhere", "HOST:PORT"]),
        (["call", "127.0.0.1:1", "STATUS", "{bad"], ["JSON"]),
        (["call", "127.0.0.1:1", "STATUS", "[1]"], ["object"]),
        (["generate", "127.0.0.1:1"], ["--prompt"]),
        (["generate", "127.0.0.1:1", "--prompt", "Hi", "--top-p", "0"], ["--top-p 0", "--temperature 0"]),
        (["split", "/no/such.gguf", "--out", "x", "--shards", "2"], ["/no/such.gguf"]),
        (["publish", "/no/such"], ["/no/such"]),
        (["publish", "/", "--only-origin"], ["--origin URL"]),
        (["publish", "/", "--origin", "bucket/prefix"], ["o3://BUCKET"]),
        (["publish", "/", "--origin", "https://files.example.org/x"], ["only read from"]),
        (["publish", "/", "--origin", "o3://bkt", "--origin-key-file", "/no/such.key"], ["/no/such.key"]),
        (["pull", "smol", "--node", "nowhere"], ["nowhere", "HOST:PORT"]),
        (["verify", "smol", "--node", "nowhere"], ["nowhere", "HOST:PORT"]),
    ],
)
def test_what_is_typed_wrong_ends_with_2_and_says_what(shoal: Shoal, argv: list[str], words: list[str]) -> None:
    said = shoal(*argv)
    assert (said.code, said.out) == (2, "")
    for word in words:
        assert word in said.err
    assert "Traceback" not in said.err


# split


def test_split_writes_shards_and_shows_them(shoal: Shoal, tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    said = shoal("split", model, "--out", tmp_path / "out", "--shards", 2, "--model", "tiny")
    assert said.code == 0
    assert "layers [0, 2)" in said.out
    assert "model tiny: 2 shards" in said.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "shard-0.gguf",
        "shard-1.gguf",
    ]
    again = shoal("split", model, "--out", tmp_path / "out", "--shards", 2, "--model", "tiny", "--json")
    found = json.loads(again.out)
    assert again.code == 0
    assert f"tiny@{found['digest']}" in said.out
    assert [entry["end_layer"] for entry in found["manifest"]["shards"]] == [2, 4]


def test_names_of_every_script_are_kept_and_the_last_line_can_be_pasted(shoal: Shoal, tmp_path: Path) -> None:
    names = {"通义千问": "通义千问", "نموذج عربي": "نموذج-عربي"}
    for name, kept in names.items():
        model = write_tiny_gguf(tmp_path / "tiny.gguf", {"general.name": name})
        said = shoal("split", model, "--out", tmp_path / kept, "--shards", 2)
        assert said.code == 0
        line = said.out.splitlines()[-1]
        assert shlex.split(line)[:5] == ["shoal", "generate", "127.0.0.1:7400", "--model", kept]
        assert shoal("publish", tmp_path / kept, "--data-dir", tmp_path / "data").code == 0
    assert {folder.name for folder in (tmp_path / "data" / "shards").iterdir()} == set(names.values())


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        ([], 2, "--shard-size"),
        (["--shards", 2, "--shard-size", "1MB"], 2, "--shard-size"),
        (["--shards", 0], 2, "--shards"),
        (["--shard-size", "big"], 2, "'big'"),
        (["--shard-size", "0"], 2, "'0'"),
        (["--shard-size", "-5"], 2, "'-5'"),
        (["--shards", 5], 1, "illegal_cut"),
        (["--shard-size", "100"], 1, "illegal_cut"),
    ],
)
def test_split_refuses_what_cannot_be(
    shoal: Shoal, tmp_path: Path, options: list[object], code: int, word: str
) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    said = shoal("split", model, "--out", tmp_path / "out", *options)
    assert (said.code, said.out) == (code, "")
    assert word in said.err
    assert "cutting" not in said.err, "no bar that stands still above the error"
    assert not list(tmp_path.glob("out/*"))


def test_split_of_a_broken_file_names_it(shoal: Shoal, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03")
    said = shoal("split", tmp_path / "cut.gguf", "--out", tmp_path / "out", "--shards", 2)
    assert said.code == 1
    assert "error (invalid_shard): cut.gguf" in said.err


# publish


def test_publish_a_data_set_a_loose_file_and_any_file(shoal: Shoal, tmp_path: Path) -> None:
    files = [parquet(tmp_path / "train" / f"{name}.parquet", rows) for name, rows in (("b", 5), ("a", 7))]
    shards = tmp_path / "shards"
    said = shoal("publish", *files, "--name", "org/set", "--shards-dir", shards, "--json")
    assert said.code == 0
    manifest = json.loads((shards / "org--set" / "manifest.json").read_text())["manifest"]
    assert manifest == json.loads(said.out)["manifest"]
    assert (manifest["kind"], manifest["name"]) == ("dataset", "org/set")
    assert [(entry["filename"], entry["rows"]) for entry in manifest["shards"]] == [("a.parquet", 7), ("b.parquet", 5)]
    for file in files:
        assert (shards / "org--set" / file.name).samefile(file), "on one disk files are linked"

    assert shoal("publish", files[0], "--shards-dir", shards).code == 0
    assert (shards / "b.parquet").samefile(files[0])

    (tmp_path / "notes.txt").write_text("neither GGUF nor parquet")
    digest = json.loads(shoal("publish", tmp_path / "notes.txt", "--shards-dir", shards, "--json").out)["digest"]
    folder = shards / f"notes.txt@{digest[:12]}"
    assert json.loads((folder / "manifest.json").read_text())["manifest"]["kind"] == "file"


def test_what_is_published_in_its_place_is_pinned(shoal: Shoal, tmp_path: Path) -> None:
    shards, data = tmp_path / "shards", tmp_path / "data"
    given = [parquet(tmp_path / "train" / f"{name}.parquet", rows) for name, rows in (("a", 5), ("b", 7))]
    options = ("--name", "org/set", "--shards-dir", shards, "--data-dir", data)
    assert shoal("publish", *given, *options).code == 0
    paths = [shards / "org--set" / file.name for file in given]
    for path in paths:  # as a training run would have fetched it, and long ago
        path.write_bytes(path.read_bytes())
        os.utime(path, (1_000_000, 1_000_000))

    def files() -> list[ShardFile]:
        return [ShardFile(path, "seeding", "parquet", Fingerprint.of(path)) for path in paths]

    data.mkdir()
    pins = Pins(data, shards)
    asyncio.run(pins.unpin(files()[:1]))
    assert [pins.is_pinned(file) for file in files()] == [False, True]
    assert shoal("publish", *given, *options).code == 0
    assert [pins.is_pinned(file) for file in files()] == [True, True]
    assert paths[1].stat().st_mtime == 1_000_000, "it was pinned, and is not hashed again"


def test_publish_again_is_no_harm_and_another_of_the_name_is_refused(shoal: Shoal, tmp_path: Path) -> None:
    parquet(tmp_path / "set" / "a.parquet", 5)
    shards = tmp_path / "data" / "shards"
    first = shoal("publish", tmp_path / "set", "--data-dir", tmp_path / "data")
    assert first.code == 0
    assert "dataset set: 1 file" in first.out
    assert shoal("publish", tmp_path / "set", "--data-dir", tmp_path / "data") == first
    copy = shards / "set" / "a.parquet"
    copy.write_bytes(copy.read_bytes())
    assert shoal("publish", tmp_path / "set", "--data-dir", tmp_path / "data").code == 0

    before = {path: path.read_bytes() for path in shards.rglob("*") if path.is_file()}
    other = parquet(tmp_path / "other" / "set" / "a.parquet", 6)
    said = shoal("publish", other.parent, "--data-dir", tmp_path / "data")
    assert said.code == 1
    assert "has another dataset set@" in said.err
    loose = parquet(tmp_path / "elsewhere" / "c.parquet", 5)
    assert shoal("publish", loose, "--data-dir", tmp_path / "data").code == 0
    said = shoal("publish", parquet(tmp_path / "c.parquet", 6), "--data-dir", tmp_path / "data")
    assert said.code == 1
    assert "is another file" in said.err
    assert {path: path.read_bytes() for path in before} == before


def test_publish_a_folder_made_by_split(shoal: Shoal, tmp_path: Path) -> None:
    cut, shards = tmp_path / "cut", tmp_path / "shards"
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    assert shoal("split", model, "--out", cut, "--shards", 2, "--model", "org/tiny").code == 0
    (cut / "readme.md").write_text("not named in the manifest")
    said = shoal("publish", cut, "--shards-dir", shards, "--json")
    assert said.code == 0
    assert json.loads(said.out)["manifest"]["kind"] == "model"
    assert sorted(path.name for path in (shards / "org--tiny").iterdir()) == [
        "manifest.json",
        "shard-0.gguf",
        "shard-1.gguf",
    ]
    assert shoal("publish", cut, "--shards-dir", shards, "--name", "mine").code == 2
    (cut / "shard-1.gguf").unlink()
    said = shoal("publish", cut, "--shards-dir", tmp_path / "elsewhere")
    assert said.code == 1
    assert "shard-1.gguf is not there" in said.err
    assert not (tmp_path / "elsewhere").exists()


def test_publish_at_an_origin_too_and_at_an_origin_alone(shoal: Shoal, tmp_path: Path) -> None:
    files = parquet(tmp_path / "set" / "a.parquet", 5), parquet(tmp_path / "set" / "b.parquet", 6)
    data, origin = tmp_path / "data", tmp_path / "origin"
    said = shoal("publish", tmp_path / "set", "--data-dir", data, "--origin", f"file://{origin}")
    assert said.code == 0
    assert "uploaded; its manifest: file://" in said.out
    stored = {path.name: path.read_bytes() for path in (origin / "shards").iterdir()}
    assert stored == {hash_file(file).content_id: file.read_bytes() for file in files}
    assert (data / "shards" / "set" / "a.parquet").exists()
    loose = shoal("publish", files[0], "--data-dir", data, "--origin", f"file://{origin}", "--json")
    assert json.loads(loose.out)["folder"].startswith(str(data / "shards" / "a.parquet@")), "its manifest is kept"
    alone = shoal(
        "publish", files[1], "--data-dir", tmp_path / "d", "--origin", f"file://{origin}", "--only-origin", "--json"
    )
    assert json.loads(alone.out)["folder"] is None
    assert not (tmp_path / "d" / "shards").exists()
    verified = shoal("verify", "set", "--node", "127.0.0.1:1", "--at", f"file://{origin}", "--json")
    assert verified.code == 0
    assert [copy["state"] for copy in json.loads(verified.out)["copies"]] == ["good", "good"]


def test_publish_at_an_origin_alone_does_not_look_at_the_daemons_folder(shoal: Shoal, tmp_path: Path) -> None:
    data, origin = tmp_path / "data", f"file://{tmp_path}/o"
    assert shoal("publish", parquet(tmp_path / "set" / "a.parquet", 5), "--name", "set", "--data-dir", data).code == 0
    other = parquet(tmp_path / "other" / "b.parquet", 6)
    command = ("publish", other, "--name", "set", "--data-dir", data, "--origin", origin)
    assert "has another" in shoal(*command).err
    assert shoal(*command, "--only-origin").code == 0
    assert hash_file(other).content_id in [path.name for path in (tmp_path / "o" / "shards").iterdir()]


@pytest.mark.parametrize("name", ["set@0123abcd", "owner/set@" + "ab" * 32, "ab" * 32])
def test_a_name_that_nobody_could_find_is_not_published(shoal: Shoal, tmp_path: Path, name: str) -> None:
    file = parquet(tmp_path / "a.parquet", 5)
    said = shoal("publish", file, "--name", name, "--data-dir", tmp_path / "data")
    assert (said.code, said.out) == (2, "")
    assert "another name" in said.err
    assert not (tmp_path / "data" / "shards").exists()


def test_verify_tells_a_torrent_file_that_is_not_there_from_one_that_cannot_be_read(
    shoal: Shoal, tmp_path: Path
) -> None:
    path = tmp_path / "set" / "a.bin"
    path.parent.mkdir()
    path.write_bytes(bytes(600_000))
    origin = f"file://{tmp_path}/o"
    assert shoal("publish", path, "--name", "set", "--data-dir", tmp_path / "d", "--origin", origin).code == 0
    (torrent,) = (tmp_path / "o" / "torrents").iterdir()

    def found() -> tuple[int, list[str]]:
        said = shoal("verify", "set", "--node", "127.0.0.1:1", "--at", origin, "--json")
        return said.code, [copy["state"] for copy in json.loads(said.out)["copies"]]

    assert found() == (0, ["good"])
    for garbage in (b"garbage", b"", bytes(20_000), torrent.read_bytes()[:-40]):
        torrent.write_bytes(garbage)
        assert found() == (1, ["damaged"])
    torrent.unlink()
    assert found() == (0, ["good"]), "others put plain files there"


def test_publish_again_keeps_the_identity_that_signs(shoal: Shoal, tmp_path: Path) -> None:
    parquet(tmp_path / "set" / "a.parquet", 5)
    command = ("publish", tmp_path / "set", "--data-dir", tmp_path / "data", "--origin", f"file://{tmp_path}/o")
    assert shoal(*command).code == 0
    manifest = tmp_path / "data" / "shards" / "set" / "manifest.json"
    signed = json.loads(manifest.read_text())
    key = SigningKey.load_or_create(tmp_path / "data" / "node.key")
    assert signed["publisher"] == key.node_id
    assert shoal(*command).code == 0
    assert json.loads(manifest.read_text()) == signed
    (tmp_path / "data" / "node.key").write_bytes(b"short")
    said = shoal(*command)
    assert said.code == 1
    assert "a node key has 32" in said.err


def test_publish_follows_links_but_keeps_their_names(shoal: Shoal, tmp_path: Path) -> None:
    """A Hugging Face cache is a folder of links to files that are named by their hash."""
    blob = parquet(tmp_path / "blobs" / "0123abcd", 9)
    (tmp_path / "train.parquet").symlink_to(blob)
    assert shoal("publish", tmp_path / "train.parquet", "--shards-dir", tmp_path / "shards").code == 0
    placed = tmp_path / "shards" / "train.parquet"
    assert not placed.is_symlink()
    assert hash_file(placed) == hash_file(blob)


def test_publish_refuses_what_no_daemon_would_share(shoal: Shoal, tmp_path: Path) -> None:
    shards = tmp_path / "shards"

    def refused(*argv: object) -> str:
        said = shoal("publish", *argv, "--shards-dir", shards)
        assert said.code in (1, 2)
        assert "Traceback" not in said.err
        assert not list(shards.rglob("*.parquet"))
        return said.err

    good = parquet(tmp_path / "a" / "x.parquet", 3)
    assert "one name" in refused(good, parquet(tmp_path / "b" / "x.parquet", 4), "--name", "set")
    assert "need a --name" in refused(good, parquet(tmp_path / "b" / "y.parquet", 4))
    for name in ("..", "../../out", "/etc", ".hidden", "a/b/c", ""):
        assert refused(good, "--name", name)
    (tmp_path / "empty").mkdir()
    assert "no file there" in refused(tmp_path / "empty")
    (tmp_path / "zero.bin").touch()
    assert "empty" in refused(tmp_path / "zero.bin")
    (tmp_path / "junk.parquet").write_bytes(b"PAR1 nothing PAR1")
    assert "junk.parquet" in refused(tmp_path / "junk.parquet")
    (tmp_path / "x.part").write_bytes(b"unfinished")
    assert "x.part" in refused(tmp_path / "x.part")
    assert not (tmp_path / "out").exists()


# call, nodes, status, generate


def test_call_prints_one_envelope(shoal: Shoal, node: FakeNode) -> None:
    said = shoal("call", node.target, "status")
    assert said.code == 0
    envelope = json.loads(said.out)
    assert said.out.count("\n") == 1
    assert set(envelope) == {"command", "request_id", "status", "result"}
    assert (envelope["command"], envelope["status"]) == ("STATUS", "ok")
    assert envelope["result"]["node_id"] == NODE


def test_call_with_an_error_is_an_envelope_too_and_ends_with_1(shoal: Shoal, node: FakeNode) -> None:
    said = shoal("call", node.target, "load-shard", '{"shard_id": 9}')
    assert said.code == 1
    envelope = json.loads(said.out)
    assert envelope["command"] == "LOAD_SHARD"
    assert envelope["status"] == "error"
    assert envelope["error"]["code"] == "shard_not_found"
    assert envelope["error"]["details"] == {"shards": 3, "raw": "01ff"}
    (notification,) = map(json.loads, said.err.splitlines())
    assert notification["notification"] == "PROGRESS"
    assert notification["request_id"] == envelope["request_id"]


def test_call_of_a_node_that_is_not_there_is_an_envelope(shoal: Shoal) -> None:
    said = shoal("call", "127.0.0.1:1", "STATUS")
    assert said.code == 1
    assert json.loads(said.out)["error"]["code"] == "unreachable"


def test_status_and_nodes_for_people_fit_80_columns(shoal: Shoal, node: FakeNode) -> None:
    said = shoal("status", node.target)
    assert said.code == 0
    for word in ("reef", "3.0 GiB free of 8.0 GiB", "[smol] shards 0, 2: 1 sessions", "shard-1.gguf 25%", "process 77"):
        assert word in said.out
    nodes = shoal("nodes", node.target)
    assert nodes.code == 0
    assert "aaaaaaaaaaaa (asked)" in nodes.out
    assert "10.0.0.5:7400" in nodes.out
    assert max(map(len, (said.out + nodes.out).splitlines())) <= 80


def test_status_and_nodes_as_json(shoal: Shoal, node: FakeNode) -> None:
    assert json.loads(shoal("status", node.target, "--json").out)["cluster"] == "reef"
    found = json.loads(shoal("nodes", node.target, "--json").out)["nodes"]
    assert [one["here"] for one in found] == [True, False]


def test_files_says_what_is_pinned(shoal: Shoal, node: FakeNode) -> None:
    said = shoal("files", "--node", node.target)
    assert said.code == 0
    rows = [line.split() for line in said.out.splitlines() if ".bin" in line]
    assert [(row[0].rpartition("/")[2], row[-1]) for row in rows] == [("0.bin", "pinned"), ("1.bin", "1")]
    assert "2 files, 2.0 MiB; 1 pinned, 1.0 MiB" in said.out
    assert max(map(len, said.out.splitlines())) <= 80
    found = json.loads(shoal("files", "--node", node.target, "--json").out)["files"]
    assert [one.get("pinned", False) for one in found] == [True, False]


def test_unpin_says_what_may_be_evicted(shoal: Shoal, node: FakeNode) -> None:
    said = shoal("unpin", "set", "--node", node.target)
    assert (said.code, said.err) == (0, "")
    assert said.out == "dataset set: 1 shard unpinned, 1.0 MiB; 2.0 MiB may be evicted now\n"
    assert node.asked[-1] == {"dataset": SET.digest}
    assert json.loads(shoal("unpin", "set", "--node", node.target, "--json").out)["evictable_bytes"] == 2 << 20


def test_evict_deletes_what_is_here_and_says_what_stays(shoal: Shoal, node: FakeNode) -> None:
    node.asked.clear()
    said = shoal("evict", "set", "--node", node.target)
    assert (said.code, said.out) == (1, "dataset set: 1 shard deleted, 1.0 MiB\n")
    assert said.err == "error (shard_in_use): shard 1 is held by 1 lease\n"
    assert node.asked == [{"dataset": SET.digest, "shard_id": shard_id} for shard_id in (0, 1)]


def test_an_unreachable_node_is_one_line(shoal: Shoal) -> None:
    for argv in (["status"], ["nodes"], ["generate"]):
        said = shoal(*argv, "127.0.0.1:1", *(["--prompt", "x"] if argv == ["generate"] else []))
        assert (said.code, said.out) == (1, "")
        assert said.err.startswith("error (unreachable): cannot connect to 127.0.0.1:1")
        assert said.err.count("\n") == 1


def test_generate_streams_text_to_stdout_and_figures_to_stderr(shoal: Shoal, node: FakeNode) -> None:
    said = shoal("generate", node.target, "--model", "smol", "--prompt", "[why]", "--max-tokens", 3, "--seed", 7)
    assert said.code == 0
    assert said.out == "".join(PIECES) + "\n"
    assert "9 + 3 tokens" in said.err
    assert "first after 0.25 s" in said.err
    assert "12.5 tokens/s" in said.err
    asked = node.asked[-1]
    assert asked["messages"] == [{"role": "user", "content": "[why]"}]
    assert (asked["model"], asked["max_tokens"], asked["seed"], asked["stream"]) == ("smol", 3, 7, True)


def test_generate_shows_what_is_loaded_for_it(shoal: Shoal, node: FakeNode) -> None:
    said = shoal("generate", node.target, "--model", "cold", "--prompt", "hello")
    assert said.out == "".join(PIECES) + "\n"
    assert "shard 4 downloading" in said.err
    assert "1.0/2.0 MiB" in said.err


def test_generate_as_json_streams_nothing(shoal: Shoal, node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin"))
    said = shoal("generate", node.target, "--prompt", "-", "--raw", "--json")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out)["text"] == "".join(PIECES)
    assert node.asked[-1]["prompt"] == "from stdin"
    assert node.asked[-1]["stream"] is False
