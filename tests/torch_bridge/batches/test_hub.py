"""StreamingBatchDataset over the hub's stand-in, through huggingface_hub's own file system."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from node.origin.core.credentials import Credentials, Secret
from node.origin.settings import OriginSettings
from protocol.errors import OriginCorruptError, OriginDeniedError, OriginNotFoundError, OriginUnavailableError
from tests.support.bridge.batches import bodies, dataset, name_and_body, only_name, sampled
from tests.support.bridge.o3_client import served
from tests.support.origins.servers import HubStandIn, hub_stand_in, raw_server
from torch_bridge import O3Client, RetryPolicy
from torch_bridge.batches.sources.hub import HubFiles
from torch_bridge.batches.sources.range_file import PIECE_BYTES

FILES = bodies(9) | {"clips/odd name @1 #2 100%.bin": b"odd" * 999}
NAMES = sorted(key.rpartition("/")[2] for key in FILES)
REPO = "hf://datasets/some/data"


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with served(hub_stand_in(FILES | {"README.md": b"text"})) as hub:
        yield hub


def client_of(hub: HubStandIn, token: str | None = None, total_s: float = 20.0) -> O3Client:
    credentials = Credentials(hf_token=Secret(token) if token else None)
    settings = OriginSettings(hf_endpoint=f"http://127.0.0.1:{hub.port}", credentials=credentials)
    return O3Client(settings=settings, retry=RetryPolicy(total_s=total_s))


def test_each_file_of_a_repository_comes_once(hub: HubStandIn, tmp_path: Path) -> None:
    with client_of(hub) as client:
        files = dataset(f"{REPO}/clips", tmp_path / "cache", client=client, decode=name_and_body)
        assert isinstance(files.source, HubFiles)
        with sampled(tmp_path / "cache") as sizes:
            found = list(files)
        again = list(files)
    assert len(found) == len(FILES)
    by_name = {re.sub(r"[^A-Za-z0-9._ -]", "_", key.rpartition("/")[2]): body for key, body in FILES.items()}
    assert {name: body for name, body, _ in found} == by_name
    assert sorted(again) == sorted(found)
    assert again != found
    assert max(count for _, count in sizes) <= 8
    asked = {headers["user-agent"].partition("/")[0] for _, path, headers in hub.requests if "/resolve/" in path}
    assert asked == {"unknown"}, "huggingface_hub itself asks for the bytes"


def test_files_whose_name_cannot_be_a_key_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"clips/new\nline.bin": b"x", "clips/back\\slash.bin": b"x"}
    with served(hub_stand_in(FILES | odd)) as hub, client_of(hub) as client:
        found = list(dataset(f"{REPO}/clips", tmp_path / "cache", client=client, decode=name_and_body))
    assert sorted(body for _, body, _ in found) == sorted(FILES.values())
    (record,) = [one for one in caplog.records if "leaves out" in one.getMessage()]
    assert f"leaves out 2 of {len(FILES) + 2} objects: 'back\\\\slash.bin', 'new\\nline.bin'" in record.getMessage()


def test_large_files_come_in_ranges_and_the_token_stays_at_the_hub(tmp_path: Path) -> None:
    body = bytes(range(256)) * (3 * PIECE_BYTES // 256) + b"end"
    with served(raw_server(body)) as elsewhere, served(hub_stand_in({}, elsewhere.url, token="hf-secret")) as hub:
        hub.files = {"large.bin": body}
        with client_of(hub, "hf-secret") as client:
            options: dict[str, Any] = {"decode": name_and_body, "max_bytes": 2 * len(body), "cache_size": 1}
            ((_, found, _),) = dataset(REPO, tmp_path / "cache", client=client, **options)
            assert b"hf-secret" not in pickle.dumps(HubFiles(client.at(REPO)))
        assert found == body
        spans = sorted(elsewhere.given)
        assert max(end - start for start, end in spans) == PIECE_BYTES
        assert sum(end - start for start, end in spans) == len(body)
        assert not [headers for _, _, headers in elsewhere.requests if "authorization" in headers]
        with client_of(hub) as client, pytest.raises((OriginDeniedError, OriginNotFoundError), match="HF_TOKEN"):
            list(dataset(REPO, tmp_path / "other", client=client))


def test_what_is_pushed_in_the_middle_of_an_epoch_is_for_the_next(hub: HubStandIn, tmp_path: Path) -> None:
    newer = {key: body[::-1] for key, body in FILES.items()}
    with client_of(hub) as client:
        options: dict[str, Any] = {"decode": name_and_body, "client": client, "cache_size": 1, "concurrency": 1}
        steps = iter(dataset(f"{REPO}/clips", tmp_path / "cache", **options))
        found = [next(steps)]
        hub.push("f" * 40, newer)
        found += steps
        assert sorted(body for _, body, _ in found) == sorted(FILES.values())
        after = list(dataset(f"{REPO}/clips", tmp_path / "cache", **options))
    assert sorted(body for _, body, _ in after) == sorted(newer.values())


def test_what_the_hub_does_wrong(hub: HubStandIn, tmp_path: Path) -> None:
    with client_of(hub) as client:
        hub.statuses = [429, 503]
        assert len(list(dataset(f"{REPO}/clips", tmp_path / "cache", client=client))) == len(FILES)
        with pytest.raises(OriginNotFoundError):
            list(dataset("hf://datasets/no/such", tmp_path / "none", client=client))
        hub.statuses = [404]
        with pytest.raises(OriginNotFoundError):
            # One at a time: none of its requests is under way when the next answer is set.
            list(dataset(f"{REPO}/clips", tmp_path / "gone", client=client, concurrency=1))
        hub.statuses = [404]
        skipping = dataset(f"{REPO}/clips", tmp_path / "skips", client=client, on_missing="skip")
        assert len(list(skipping)) == len(FILES) - 1
    assert skipping.report().skipped == 1


def test_a_server_that_ignores_ranges_is_told(tmp_path: Path) -> None:
    body = bytes(PIECE_BYTES + 9)
    with (
        served(raw_server(body, "ignores-range")) as elsewhere,
        served(hub_stand_in({"large.bin": body}, elsewhere.url)) as hub,
        client_of(hub, total_s=0.5) as client,
        pytest.raises(OriginCorruptError, match="bytes came"),
    ):
        list(dataset(REPO, tmp_path / "cache", client=client, cache_size=1, max_bytes=2 * len(body)))


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_it_after_their_parent_has(hub: HubStandIn, tmp_path: Path, start: str) -> None:
    with client_of(hub) as client:
        files = dataset(f"{REPO}/clips", tmp_path / "cache", client=client, decode=only_name)
        assert len(files.source.list(tmp_path)) == len(FILES)
        loader = DataLoader(files, batch_size=None, num_workers=2, multiprocessing_context=start)
        assert len(set(loader)) == len(FILES)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_hub_that_is_away_is_told(hub: HubStandIn, tmp_path: Path) -> None:
    with client_of(hub, total_s=0.2) as client:
        hub.statuses = [503] * 1000
        with pytest.raises(OriginUnavailableError, match="503"):
            list(dataset(f"{REPO}/clips", tmp_path / "cache", client=client, concurrency=1))
