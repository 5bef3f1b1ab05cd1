"""Leases and PUBLISH between real daemons: what a training run asks of the node on its machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protocol.content import hash_file
from protocol.errors import InvalidParamsError, InvalidShardError, ShardInUseError
from tests.support.daemons import Daemon, daemon, shoal
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]  # daemons and servers of their own

ROWS = (100, 250, 50)


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A node that seeds the data set `org/set` of three parquet shards."""
    home = tmp_path_factory.mktemp("seed")
    for number, rows in enumerate(ROWS):
        path = home / "set" / f"shard_{number:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": [f"{number} {row} " + "word " * 300 for row in range(rows)]}), path)
        os.utime(path, (1e9, 1e9))
    assert shoal("publish", str(home / "set"), "--name", "org/set", "--data-dir", str(home)).returncode == 0
    with daemon(home) as node:
        wait_until(lambda: [file["state"] for file in node.files().values()] == ["seeding"] * 3)
        yield node


@pytest.fixture(scope="module")
def shared_trainer(seed: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(tmp_path_factory.mktemp("trainer"), bootstrap=seed) as node:
        yield node


@pytest.fixture
def trainer(shared_trainer: Daemon) -> Iterator[Daemon]:
    """A node without shards and leases."""
    node = shared_trainer
    assert (node.files(), node.call("STATUS")["leases"]) == ({}, [])
    yield node
    for one in node.call("STATUS")["leases"]:
        node.call("RELEASE", {"lease": one["lease"]})
    for path in (node.home / "shards").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    wait_until(lambda: node.files() == {})


def which(shard_id: int, name: str = "org/set") -> dict[str, object]:
    return {"dataset": name, "shard_id": shard_id}


def leases_of(node: Daemon) -> dict[str, int]:
    return {Path(name).name: file.get("leases", 0) for name, file in node.files().items()}


def test_a_leased_shard_stays_until_it_is_released_or_expires(trainer: Daemon) -> None:
    signed = trainer.call("GET_MANIFEST", {"dataset": "org/set"})
    assert [entry["rows"] for entry in signed["signed"]["manifest"]["shards"]] == list(ROWS)
    name = f"org/set@{signed['digest'][:12]}"
    for lease in ("rank-0", "rank-1"):
        fetched = trainer.call("FETCH_SHARD", which(0, name) | {"lease": lease, "ttl_s": 100})
    trainer.call("FETCH_SHARD", which(1) | {"lease": "rank-0", "ttl_s": 4})
    assert leases_of(trainer) == {"shard_00000.parquet": 2, "shard_00001.parquet": 1}
    status = {one["lease"]: one for one in trainer.call("STATUS")["leases"]}
    assert {name: one["shards"] for name, one in status.items()} == {"rank-0": 2, "rank-1": 1}
    assert 90 < status["rank-1"]["expires_in_s"] <= 100

    with pytest.raises(ShardInUseError, match="held by 2 leases for") as refused:
        trainer.call("EVICT_SHARD", which(0))
    assert refused.value.details["leases"] == 2
    assert 90 < refused.value.details["expires_in_s"] <= 100

    wait_until(lambda: leases_of(trainer)["shard_00001.parquet"] == 0)
    (renewed,) = trainer.call("RENEW", {"lease": "rank-0", "ttl_s": 50})["shards"]
    assert (renewed["shard_id"], renewed["path"], renewed["content_id"]) == (0, fetched["path"], fetched["content_id"])
    assert trainer.call("EVICT_SHARD", which(1, name))["status"] == "evicted"

    (kept,) = trainer.call("RELEASE", which(0, name) | {"lease": "rank-0", "evict": True})["shards"]
    assert (kept["held"], kept["gone"], kept["leases"]) == (True, False, 1)
    assert "held by 1 lease" in kept["kept_because"]
    assert Path(fetched["path"]).exists()
    (gone,) = trainer.call("RELEASE", {"lease": "rank-1", "evict": True})["shards"]
    assert (gone["held"], gone["gone"], gone["leases"], gone["kept_because"]) == (True, True, 0, "")
    assert not Path(fetched["path"]).exists()


def test_a_shard_that_was_published_here_is_not_deleted_by_who_has_read_it(seed: Daemon) -> None:
    read = seed.call("FETCH_SHARD", which(0) | {"lease": "run"})
    for _ in range(2):  # the second time the lease holds nothing any more
        (kept,) = seed.call("RELEASE", which(0) | {"lease": "run", "evict": True})["shards"]
        assert (kept["gone"], kept["leases"], kept["published"]) == (False, 0, True)
        assert "published here" in kept["kept_because"]
    assert Path(read["path"]).exists()


def test_a_lease_that_the_node_does_not_know_is_an_answer_and_a_fetch_takes_it_again(
    seed: Daemon, tmp_path: Path
) -> None:
    lease = {"lease": "run"}
    with daemon(tmp_path / "trainer", bootstrap=seed) as node:
        node.call("FETCH_SHARD", which(2) | lease)
        assert len(node.call("RENEW", lease)["shards"]) == 1
    with daemon(tmp_path / "trainer", bootstrap=seed) as node:
        assert node.call("RENEW", lease) == {"lease": "run", "shards": []}
        assert node.call("RENEW", which(2) | lease)["shards"] == []
        assert node.call("RELEASE", lease) == {"lease": "run", "shards": []}
        again = node.call("FETCH_SHARD", which(2) | lease)
        assert (again["source"], again["bytes_by_source"]) == ("local", {})
        assert node.call("RENEW", lease)["shards"][0]["path"] == again["path"]
        (released,) = node.call("RELEASE", which(2) | {"lease": "other", "evict": True})["shards"]
        assert (released["held"], released["gone"], released["leases"]) == (False, False, 1)
        node.call("RELEASE", lease)
        (released,) = node.call("RELEASE", which(2) | lease | {"evict": True})["shards"]
        assert (released["held"], released["gone"]) == (False, True)


def test_a_fetch_that_goes_on_in_the_background_is_leased_from_its_beginning(trainer: Daemon) -> None:
    answer = trainer.call("FETCH_SHARD", which(1) | {"lease": "run", "wait": False})
    assert answer["status"] == "fetching"
    assert [one["lease"] for one in trainer.call("STATUS")["leases"]] == ["run"]
    with pytest.raises(ShardInUseError):
        trainer.call("EVICT_SHARD", which(1))
    wait_until(lambda: bool(trainer.call("RENEW", {"lease": "run"})["shards"][0]["path"]))
    assert trainer.call("STATUS")["leases"][0]["shards"] == 1


def test_a_shard_found_wrong_is_fetched_anew_from_elsewhere(trainer: Daemon) -> None:
    fetched = trainer.call("FETCH_SHARD", which(0) | {"lease": "run"})
    path = Path(fetched["path"])
    seen = path.stat()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))

    task = {"task_type": "verify_shard"} | which(0)
    found = trainer.call("EXECUTE_TASK", task)
    assert (found["valid"], found["expected"]) == (False, fetched["content_id"])
    assert trainer.call("RENEW", {"lease": "run"})["shards"][0]["path"] == "", "it is leased, and not there"
    again = trainer.call("FETCH_SHARD", which(0) | {"lease": "run"})
    assert (again["source"], again["path"]) == ("peers", fetched["path"])
    assert hash_file(path).content_id == fetched["content_id"]
    assert trainer.call("EXECUTE_TASK", task)["valid"] is True
    aside = path.with_name(path.name + ".invalid")
    assert aside.read_bytes() == raw
    trainer.call("RELEASE", {"lease": "run", "evict": True})
    assert not path.exists()
    assert not aside.exists(), "what was set aside goes with the shard"


def test_a_copy_that_changed_is_not_taken_for_the_shard(seed: Daemon, trainer: Daemon) -> None:
    # The same content under another manifest's name, so that a fetch finds a copy of it here.
    source = seed.home / "set" / "shard_00002.parquet"
    loose = trainer.home / "shards" / "copy.parquet"
    loose.write_bytes(source.read_bytes())
    os.utime(loose, (1e9, 1e9))
    wait_until(lambda: trainer.files().get("copy.parquet", {}).get("state") == "seeding")
    raw = bytearray(loose.read_bytes())
    raw[len(raw) // 2] ^= 1
    with loose.open("r+b") as file:
        file.write(raw)
    os.utime(loose, (1e9, 1e9))
    wait_until(lambda: trainer.files()["copy.parquet"]["state"] == "seeding")
    fetched = trainer.call("FETCH_SHARD", which(2))
    assert fetched["source"] == "peers"
    assert hash_file(Path(fetched["path"])).content_id == fetched["content_id"]
    assert trainer.files()["copy.parquet"]["state"] == "invalid"


def test_leases_of_many_clients_expire_by_themselves(trainer: Daemon) -> None:
    for number in range(5):
        trainer.call("FETCH_SHARD", which(2) | {"lease": f"run-{number}", "ttl_s": 4})
    assert leases_of(trainer)["shard_00002.parquet"] >= 1
    wait_until(lambda: trainer.call("STATUS")["leases"] == [])
    assert trainer.call("EVICT_SHARD", which(2))["status"] == "evicted"


def test_what_is_published_by_rpc_is_found_by_others_and_at_the_origin(tmp_path: Path) -> None:
    origin = f"file://{tmp_path}/origin"
    folder = tmp_path / "made"
    folder.mkdir()
    for number in range(2):
        pq.write_table(pa.table({"n": list(range(10 + number))}), folder / f"{number}.parquet")
    (tmp_path / "weights.bin").write_bytes(b"x" * 100_000)
    with (
        daemon(tmp_path / "a", "--origin", origin) as node,
        daemon(tmp_path / "b", bootstrap=node) as other,
    ):
        seen: list[object] = []
        asked = {"path": str(folder), "name": "org/new", "origins": [origin]}
        answer = node.call("PUBLISH", asked, on_notification=lambda _, values: seen.append(values["phase"]))
        assert (answer["status"], answer["name"], answer["kind"], answer["shards"]) == (
            "published", "org/new", "dataset", 2,
        )  # fmt: skip
        assert answer["bytes"] == answer["uploaded_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
        assert answer["manifest_urls"][0].startswith(origin)
        assert {"verifying", "uploading"} == set(seen)
        fetched = other.call("FETCH_SHARD", which(1, "org/new"))
        assert Path(fetched["path"]).read_bytes() == (folder / "1.parquet").read_bytes()
        entries = node.call("GET_MANIFEST", {"name": "org/new"})["signed"]["manifest"]["shards"]
        assert [entry["rows"] for entry in entries] == [10, 11]
        again = node.call("PUBLISH", asked)
        assert (again["digest"], again["uploaded_bytes"]) == (answer["digest"], 0)
        loose = node.call("PUBLISH", {"path": str(tmp_path / "weights.bin")})
        assert (loose["kind"], loose["name"]) == ("file", "weights.bin")
        assert other.call("FETCH_SHARD", {"filename": "weights.bin"})["source"] == "peers"
        node.call("PUBLISH", {"path": str(folder), "name": "later", "wait": False})
        wait_until(lambda: "later" in [file.get("dataset") for file in node.files().values()])

        manifest = node.call("GET_MANIFEST", {"name": "org/new"})["signed"]["manifest"]
        given = node.call("PUBLISH", {"path": str(folder), "manifest": manifest | {"name": "given"}})
        assert given["name"] == "given"
        wrong = [entry | {"content_id": "ab" * 32} for entry in manifest["shards"]]
        with pytest.raises(InvalidShardError, match="manifest says"):
            node.call("PUBLISH", {"path": str(folder), "manifest": manifest | {"name": "wrong", "shards": wrong}})


def test_a_request_cannot_make_the_node_give_away_what_it_should_not(tmp_path: Path) -> None:
    secret = tmp_path / ".ssh" / "id"
    secret.parent.mkdir()
    secret.write_bytes(b"secret")
    link = tmp_path / "link.bin"
    link.symlink_to(secret)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"a" * 99)
    (folder / "b.bin").symlink_to(secret)
    os.mkfifo(tmp_path / "pipe.bin")
    with daemon(tmp_path / "a") as node:
        for path, why in (
            (secret, "hidden"),
            (link, "link"),
            (folder, "link"),
            (tmp_path / "pipe.bin", "device"),
            (tmp_path / "a" / "node.key", "belongs to the node"),
            (tmp_path / "a", "belongs to the node"),
            (Path("relative.bin"), "relative"),
            (tmp_path / "nowhere", "No such file"),
        ):
            with pytest.raises(InvalidParamsError, match=why):
                node.call("PUBLISH", {"path": str(path)})
        with pytest.raises(InvalidParamsError, match="not an origin of this node"):
            node.call("PUBLISH", {"path": str(folder / "a.bin"), "origins": ["s3://elsewhere/x"]})
        assert node.files() == {}
    narrow = daemon(tmp_path / "b", "--publish-from", str(tmp_path / "allowed"))
    with narrow as node, pytest.raises(InvalidParamsError, match="publish-from"):
        node.call("PUBLISH", {"path": str(folder / "a.bin")})
