"""Files inside archives, member by member, with the archive at an origin."""

from __future__ import annotations

import io
import subprocess
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from protocol.errors import InvalidParamsError, InvalidShardError
from tests.torch_bridge.batches_parts import SIZE, bodies, dataset, folder_of, name_and_body, sampled
from torch_bridge.batches.archives import ArchiveFiles, Limits
from torch_bridge.batches.plan import RemoteFile

FILES = bodies(11)
NAMES = sorted(key.rpartition("/")[2] for key in FILES)
KINDS = ["a.tar", "a.zip", "a.tar.gz", "a.tar.bz2", "a.tar.xz", "a.tar.zst"]


def pack(name: str, files: dict[str, bytes]) -> bytes:
    """An archive of the kind that its name says, with what must be passed over too."""
    out = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.mkdir("clips")
            for key, body in files.items():
                archive.writestr(key, body)
        return out.getvalue()
    compression = name.rpartition(".")[2]
    with tarfile.open(fileobj=out, mode="w:" if compression in ("tar", "zst") else f"w:{compression}") as tar:  # type: ignore[call-overload]
        for key, kind in (("clips", tarfile.DIRTYPE), ("clips/link", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(key)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for key, body in files.items():
            member = tarfile.TarInfo(key)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    if compression == "zst":
        return subprocess.run(["zstd", "-c"], input=out.getvalue(), capture_output=True, check=True).stdout
    return out.getvalue()


def source(folder: Path, name: str, files: dict[str, bytes] = FILES, **others: object) -> ArchiveFiles:
    return ArchiveFiles(folder_of(folder, {name: pack(name, files)}), [name], **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KINDS)
def test_each_member_comes_once_and_the_archive_is_never_here(name: str, tmp_path: Path) -> None:
    files = dataset(source(tmp_path / "origin", name), tmp_path / "cache", decode=name_and_body)
    with sampled(tmp_path / "cache") as sizes:
        found = list(files)
    assert {f"clips/{name}": body for name, body, _ in found} == FILES
    assert max(count for _, count in sizes) <= 8
    in_order = [name for name, _, _ in found] == NAMES
    assert in_order == name.startswith("a.tar.")


@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.tar.gz"])
def test_a_run_that_was_left_goes_on_at_its_member(name: str, tmp_path: Path) -> None:
    files = source(tmp_path / "origin", name)
    whole = list(dataset(files, tmp_path / "whole"))
    steps = iter(dataset(files, tmp_path / "cache"))
    assert [next(steps) for _ in range(6)] == whole[:6]
    steps.close()  # type: ignore[attr-defined]
    assert list(dataset(files, tmp_path / "cache")) == whole[5:]
    workers = DataLoader(dataset(files, tmp_path / "other"), batch_size=None, num_workers=2)
    assert sorted(workers) == NAMES


def test_names_that_lead_elsewhere_stay_in_the_folder(tmp_path: Path) -> None:
    for number, name in enumerate(("a.tar", "a.zip", "a.tar.gz")):
        bad = {"../../outside.bin": b"1" * 99, "/abs/olute.bin": b"2" * 99, "..": b"3" * 99}
        files = dataset(source(tmp_path / f"origin{number}", name, bad), tmp_path / f"cache{number}", decode=None)
        for path, _ in files:
            assert Path(path).resolve().is_relative_to(tmp_path / f"cache{number}" / "c000" / "files")
            assert Path(path).stat().st_size == 99
    assert not list(tmp_path.rglob("../outside.bin"))


def test_bombs_and_broken_archives_are_told(tmp_path: Path) -> None:
    for number, name in enumerate(("a.tar", "a.zip", "a.tar.gz")):
        limited = source(tmp_path / f"origin{number}", name, limits=Limits(unpacked_bytes=3 * SIZE))
        with pytest.raises(InvalidShardError, match="the limits are"):
            list(dataset(limited, tmp_path / f"cache{number}"))
        large = source(tmp_path / f"large{number}", name, {"zeros": bytes(5_000_000)})
        with pytest.raises(InvalidParamsError, match=r"'a.*zeros' has 5000000 bytes"):
            list(dataset(large, tmp_path / f"large-cache{number}"))
        body = pack(name, FILES)
        half = ArchiveFiles(folder_of(tmp_path / f"half{number}", {name: body[: len(body) // 2]}), [name])
        with pytest.raises(InvalidShardError, match="archive"):
            list(dataset(half, tmp_path / f"half-cache{number}"))
    with pytest.raises(InvalidParamsError, match="no archive"):
        ArchiveFiles(folder_of(tmp_path / "origin0", {}), ["a.rar"])


def test_a_member_that_is_larger_than_it_says_is_cut_off(tmp_path: Path) -> None:
    body = pack("a.zip", {"clips/zeros": bytes(3_000_000)})
    # The directory and the header both say 1000 bytes.
    lie = body.replace((3_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    files = ArchiveFiles(folder_of(tmp_path / "origin", {"a.zip": lie}), ["a.zip"])
    (found,) = files.list(tmp_path)
    assert found.size == 1000
    with pytest.raises(InvalidShardError):
        files.fetch(found, tmp_path / "out", stop=threading.Event(), on_bytes=lambda _: None)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.part").stat().st_size <= 1000
    assert isinstance(found, RemoteFile)
