"""StreamingBatchDataset over a folder as the origin: each file once, bounds of the disk, resuming, workers."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from protocol.errors import (
    BusyError,
    InsufficientDiskError,
    InvalidParamsError,
    OriginCorruptError,
    OriginNotFoundError,
)
from tests.support.bridge.batches import SIZE, bodies, bytes_here, dataset, folder_of, name_and_body, sampled
from torch_bridge.batches.journal import merge_states
from torch_bridge.core.ranks import Ranks

FILES = bodies(23)
NAMES = sorted(key.rpartition("/")[2] for key in FILES)


@pytest.fixture
def origin(tmp_path: Path) -> Any:
    return folder_of(tmp_path / "origin", FILES)


def test_an_epoch_has_every_file_once_and_the_disk_holds_two_batches_at_most(origin: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    orders = []
    with sampled(cache) as sizes:
        for epoch in range(2):
            files = dataset(origin, cache, decode=name_and_body)
            files.set_epoch(epoch)
            found = list(files)
            assert {f"clips/{name}": body for name, body, _ in found} == FILES
            orders.append([name for name, _, _ in found])
    assert sorted(orders[0]) == sorted(orders[1]) == NAMES
    assert orders[0] != orders[1]
    assert 0 < max(size for size, _ in sizes) <= 10 * SIZE
    assert max(count for _, count in sizes) <= 8
    assert bytes_here(cache) == (0, 0)


def test_bytes_bound_the_batches_where_the_number_of_files_does_not(origin: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    # Room for two batches of one file each; and for one file alone, with nothing ahead.
    for max_bytes in (3 * SIZE, SIZE + SIZE // 2):
        with sampled(cache / str(max_bytes)) as sizes:
            assert sorted(dataset(origin, cache / str(max_bytes), cache_size=100, max_bytes=max_bytes)) == NAMES
        assert SIZE // 2 < max(size for size, _ in sizes) <= max_bytes
    with pytest.raises(InvalidParamsError, match=r"the disk may hold 39999"):
        list(dataset(origin, tmp_path / "other", max_bytes=SIZE - 1))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torch's own DataLoader
def test_the_bytes_are_those_of_all_consumers_together(origin: Any, tmp_path: Path) -> None:
    """As people write them: 160kb is 160,000 bytes, four of the files, for two workers of each of two ranks."""
    cache, found = tmp_path / "cache", []
    with sampled(cache) as sizes:
        loaders = [
            DataLoader(
                dataset(origin, cache, cache_size=100, max_bytes="160kb", ranks=Ranks(rank, 2, rank, 2)),
                batch_size=None,
                num_workers=2,
            )
            for rank in range(2)
        ]
        for batches in [iter(loader) for loader in loaders]:
            found += list(batches)
    assert sorted(found) == NAMES
    assert SIZE < max(size for size, _ in sizes) <= 4 * SIZE == 160_000


def test_a_subset_is_gone_through_several_times_and_fetched_once(origin: Any, tmp_path: Path) -> None:
    files = dataset(origin, tmp_path / "cache", epochs_per_subset=3)
    found = list(files)
    assert len(found) == 3 * len(NAMES)
    for start in range(0, len(found), 12):
        subset = found[start : start + 12]
        passes = [subset[at : at + len(subset) // 3] for at in range(0, len(subset), len(subset) // 3)]
        assert {tuple(sorted(one)) for one in passes} == {tuple(sorted(passes[0]))}
    report = files.report()
    assert (report.samples, report.downloaded_bytes) == (69, sum(map(len, FILES.values())))


def test_files_of_others_in_the_cache_folder_stay(origin: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in ("videos/1.mp4", "mine.txt", "archive-c001/1.mp4"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("mine")
    assert sorted(dataset(origin, cache)) == NAMES
    (cache / "c007").mkdir()  # a camera's, say
    (cache / "c007" / "1.mp4").write_text("mine")
    two = Ranks(0, 2, 0, 2)
    list(dataset(origin, cache, ranks=two))  # the folder is divided again
    kept = [path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()]
    assert {"videos/1.mp4", "mine.txt", "archive-c001/1.mp4", "c007/1.mp4"} <= set(kept)


@pytest.mark.parametrize("name", ["c001/1.mp4", "epochs/00000000/1.mp4"])
def test_a_folder_with_others_files_in_our_places_is_refused(origin: Any, tmp_path: Path, name: str) -> None:
    cache = tmp_path / "cache"
    (cache / name).parent.mkdir(parents=True)
    (cache / name).write_text("mine")
    with pytest.raises(InvalidParamsError, match=r"has '(c001|epochs)' and no layout\.json: .* cache_dir of its own"):
        list(dataset(origin, cache, ranks=Ranks(0, 2, 0, 2)))
    assert (cache / name).read_text() == "mine"


def test_iterations_go_on_from_epoch_to_epoch_and_a_finished_one_gives_nothing(
    origin: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = dataset(origin, tmp_path / "cache")
    first, second = list(files), list(files)
    assert sorted(first) == sorted(second) == NAMES
    assert (first != second, files.epoch) == (True, 2)
    files.set_epoch(1)
    with caplog.at_level(logging.WARNING):
        assert list(files) == []
    assert "epoch 1 is finished" in caplog.text


def test_one_that_is_left_goes_on_behind_the_last_sample_that_was_used(origin: Any, tmp_path: Path) -> None:
    whole = list(dataset(origin, tmp_path / "whole"))
    steps = iter(dataset(origin, tmp_path / "cache"))
    begun = [next(steps) for _ in range(7)]
    steps.close()  # type: ignore[attr-defined]
    # The seventh was in hand: nothing says that it was used.
    assert begun == whole[:7]
    assert list(dataset(origin, tmp_path / "cache")) == whole[6:]


def test_a_state_says_what_was_handed_over_and_survives_another_number_of_consumers(
    origin: Any, tmp_path: Path
) -> None:
    def of(rank: int, world: int, name: str) -> Any:
        return dataset(origin, tmp_path / name, ranks=Ranks(rank, world, rank, world))

    states, seen = [], []
    for rank in range(2):
        one = of(rank, 2, "two")
        steps = iter(one)
        seen += [next(steps) for _ in range(3 + rank)]
        states.append(json.loads(json.dumps(one.state_dict())))
        steps.close()  # type: ignore[attr-defined]
    merged = merge_states(states)
    rest = []
    for rank in range(3):
        one = of(rank, 3, "three")
        one.load_state_dict(merged)
        rest += list(one)
    assert sorted(seen + rest) == NAMES
    with pytest.raises(InvalidParamsError, match="seed"):
        dataset(origin, tmp_path / "x", seed=5).load_state_dict(merged)


def test_another_number_of_workers_goes_on_with_what_the_folder_knows(origin: Any, tmp_path: Path) -> None:
    steps = iter(dataset(origin, tmp_path / "cache"))
    begun = [next(steps) for _ in range(8)][:-1]
    steps.close()  # type: ignore[attr-defined]
    loader = DataLoader(dataset(origin, tmp_path / "cache"), batch_size=None, num_workers=2)
    assert sorted(begun + list(loader)) == NAMES


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=[pytest.mark.slow, pytest.mark.timeout(180)])])
def test_workers_share_the_files_and_the_disk(origin: Any, tmp_path: Path, context: str) -> None:
    cache = tmp_path / "cache"
    files = dataset(origin, cache, samples_ahead=3)
    with sampled(cache) as sizes:
        for _ in range(2 if context == "fork" else 1):
            loader = DataLoader(files, batch_size=None, num_workers=2, multiprocessing_context=context)
            assert sorted(loader) == NAMES
    assert max(count for _, count in sizes) <= 8
    assert max(size for size, _ in sizes) <= 10 * SIZE
    assert files.report().samples == (2 if context == "fork" else 1) * len(NAMES)


def test_paths_that_leave_a_worker_are_there_until_they_are_used(origin: Any, tmp_path: Path) -> None:
    others = {"decode": None, "cache_size": 20, "max_bytes": 40 * SIZE}
    with pytest.raises(InvalidParamsError, match="samples_ahead"):
        list(DataLoader(dataset(origin, tmp_path / "cache", **others), batch_size=None, num_workers=1))
    files = dataset(origin, tmp_path / "cache", samples_ahead=3, **others)
    found = [Path(path).read_bytes() for path, _ in DataLoader(files, batch_size=None, num_workers=2)]
    assert sorted(found) == sorted(FILES.values())
    with pytest.raises(InvalidParamsError, match="samples_ahead=9 is more than"):
        list(DataLoader(dataset(origin, tmp_path / "x", decode=None, samples_ahead=9), batch_size=None, num_workers=1))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_exactly(origin: Any, tmp_path: Path, workers: int) -> None:
    def loader(name: str) -> Any:
        return StatefulDataLoader(dataset(origin, tmp_path / name), batch_size=None, num_workers=workers)

    begun, one = [], loader("cache")
    for sample in one:
        begun.append(sample)
        if len(begun) == 9:
            state = one.state_dict()
            break
    del one
    other = loader("other")
    other.load_state_dict(state)
    rest = list(other)
    assert sorted(begun + rest) == NAMES


def _holds(origin: Any, cache: Path, said: Any, over: Any) -> None:
    steps = iter(dataset(origin, cache))
    next(steps)
    said.set()
    over.wait(30)


def test_two_runs_in_one_folder_are_told(origin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_bridge.batches.folder.LOCK_WAIT_S", 0.1)
    context = multiprocessing.get_context("fork")
    said, over = context.Event(), context.Event()
    other = context.Process(target=_holds, args=(origin, tmp_path / "cache", said, over))
    other.start()
    assert said.wait(30)
    with pytest.raises(BusyError, match="in use by another run"):
        next(iter(dataset(origin, tmp_path / "cache")))
    over.set()
    other.join(30)
    assert len(list(dataset(origin, tmp_path / "cache"))) == len(NAMES)


def test_two_iterations_of_one_process_in_one_folder_are_told_at_once(
    origin: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a wait: the one that is open cannot end meanwhile. One that is only garbage ends."""
    steps = iter(dataset(origin, tmp_path / "cache"))
    next(steps)
    with pytest.raises(BusyError, match=r"this process has an iteration open .*cache_dir of its own"):
        next(iter(dataset(origin, tmp_path / "cache")))
    assert "waiting for" not in caplog.text
    cycle: list[Any] = [steps]
    cycle.append(cycle)
    del steps, cycle
    assert len(list(dataset(origin, tmp_path / "cache"))) == len(NAMES)


def test_a_file_that_vanished_is_an_error_or_skipped_and_counted(origin: Any, tmp_path: Path) -> None:
    def vanish(cache: Path, **others: Any) -> list[Any]:
        files = dataset(origin, cache, cache_size=1, concurrency=1, shuffle=False, **others)
        steps = iter(files)
        found = [next(steps)]
        (tmp_path / "origin/clips/011.bin").unlink(missing_ok=True)
        found += steps
        assert files.report().skipped == 1
        return found

    assert sorted([*vanish(tmp_path / "cache", on_missing="skip"), "011.bin"]) == NAMES
    (tmp_path / "origin/clips/011.bin").write_bytes(FILES["clips/011.bin"])
    with pytest.raises(OriginNotFoundError, match=r"011\.bin"):
        vanish(tmp_path / "other")


def test_a_file_that_changed_in_an_epoch_is_never_used(origin: Any, tmp_path: Path) -> None:
    steps = iter(dataset(origin, tmp_path / "cache", cache_size=1, concurrency=1, shuffle=False))
    next(steps)
    (tmp_path / "origin/clips/011.bin").write_bytes(FILES["clips/011.bin"][::-1])
    with pytest.raises(OriginCorruptError, match=r"011\.bin"):
        list(steps)


def test_a_disk_without_room_is_told_before_anything_comes(origin: Any, tmp_path: Path) -> None:
    with pytest.raises(InsufficientDiskError, match="stay free"):
        list(dataset(origin, tmp_path / "cache", keep_free_bytes=1 << 60))
    assert bytes_here(tmp_path / "cache") == (0, 0)


CHILD = """
    import sys, time
    from pathlib import Path
    from tests.support.bridge.batches import dataset, folder_of, name_and_body
    from torch_bridge import O3Client
    for name, body, _ in dataset(O3Client().at(sys.argv[1]), Path(sys.argv[2]), decode=name_and_body):
        print(name, flush=True)
        sys.stdin.readline()
"""


@pytest.mark.slow
def test_kill_9_and_the_same_order_goes_on_with_what_is_whole(origin: Any, tmp_path: Path) -> None:
    whole = list(dataset(origin, tmp_path / "whole"))
    cache, seen = tmp_path / "cache", []
    for _ in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), origin.url, str(cache)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        assert child.stdin is not None
        assert child.stdout is not None
        for _ in range(5):
            seen.append(child.stdout.readline().strip())
            child.stdin.write("\n")
            child.stdin.flush()
        in_hand = child.stdout.readline().strip()
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    here = {path.name: path for path in cache.glob("c000/files/*/*.bin")}
    assert in_hand in here
    # A torn line of the journal, and a file that only looks begun.
    with next(cache.glob("epochs/*/c000.jsonl")).open("ab") as journal:
        journal.write(b'["clips/0')
    last = dataset(origin, cache, decode=name_and_body)
    rest = list(last)
    assert seen + [name for name, _, _ in rest] == whole
    assert all(FILES[f"clips/{name}"] == body for name, body, _ in rest)


def test_what_was_half_downloaded_goes_on_and_what_is_whole_is_used_again(origin: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    steps = iter(dataset(origin, cache))
    next(steps)
    until = time.monotonic() + 20
    while len(list(cache.glob("c000/files/*/*.bin"))) < 8 and time.monotonic() < until:
        time.sleep(0.01)
    steps.close()  # type: ignore[attr-defined]
    kept = sorted(cache.glob("c000/files/*/*.bin"))
    assert len(kept) == 8
    path = kept[0]
    sizes = [one.stat().st_size for one in kept[1:]]
    half = path.read_bytes()[: SIZE // 2]
    path.unlink()
    path.with_name(path.name + ".part").write_bytes(half)
    before = dataset(origin, cache).report().downloaded_bytes
    found = list(dataset(origin, cache, decode=name_and_body))
    assert {f"clips/{name}": body for name, body, _ in found} == FILES
    came = dataset(origin, cache).report().downloaded_bytes - before
    assert came == sum(map(len, FILES.values())) - sum(sizes) - len(half)


def test_captions_are_joined_by_name(origin: Any, tmp_path: Path) -> None:
    rows = [{"file_name": name, "text": f"about {name}"} for name in NAMES]
    (tmp_path / "origin/captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(dataset(origin, tmp_path / "cache", decode=name_and_body, metadata="captions.jsonl"))
    assert {name: meta["text"] for name, _, meta in found} == {name: f"about {name}" for name in NAMES}
    by_stem = {name.removesuffix(".bin"): name for name in NAMES}
    found = list(dataset(origin, tmp_path / "other", decode=name_and_body, metadata=by_stem))
    assert all(meta == name for name, _, meta in found if name in NAMES)
