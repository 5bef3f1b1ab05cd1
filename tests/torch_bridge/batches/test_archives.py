"""Files inside archives, member by member, with the archive at an origin."""

from __future__ import annotations

import gzip
import io
import os
import stat
import subprocess
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from protocol.errors import InvalidParamsError, InvalidShardError
from tests.support.bridge.batches import SIZE, bodies, bytes_here, dataset, folder_of, name_and_body, sampled
from torch_bridge.batches.plan import RemoteFile
from torch_bridge.batches.sources.archives import ArchiveFiles, ArchiveLimits
from torch_bridge.core.store import Store

FILES = bodies(11)
NAMES = sorted(key.rpartition("/")[2] for key in FILES)
KINDS = ["a.tar", "a.zip", "a.tar.gz", "a.tar.bz2", "a.tar.xz", "a.tar.zst"]


def typed(name: str, kind: bytes) -> tarfile.TarInfo:
    """A member of a tar that is no plain file."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def pack(name: str, files: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    """An archive of the kind that its name says, with a folder, which must be passed over."""
    out = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.mkdir("clips")
            for key, body in files.items():
                archive.writestr(key, body)
        return out.getvalue()
    compression = name.rpartition(".")[2]
    with tarfile.open(fileobj=out, mode="w:" if compression in ("tar", "zst") else f"w:{compression}") as tar:  # type: ignore[call-overload]
        for member in (typed("clips", tarfile.DIRTYPE), *others):
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


@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.tar.gz", "a.tar.zst"])
@pytest.mark.parametrize("hostile", ["../../outside.bin", "/abs/olute.bin", "..", "clips/../../x", "..\\\\x"])
def test_names_that_lead_elsewhere_are_refused_before_anything_comes(name: str, hostile: str, tmp_path: Path) -> None:
    files = dataset(source(tmp_path / "origin", name, FILES | {hostile: b"1" * 99}), tmp_path / "cache", decode=None)
    with pytest.raises(InvalidShardError, match=r"leads out of the folder.*make it again"):
        list(files)
    assert bytes_here(tmp_path / "cache") == (0, 0)
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.tar.gz"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused_or_passed_over(name: str, kind: bytes, tmp_path: Path) -> None:
    if name == "a.zip":
        link = zipfile.ZipInfo("clips/link")
        link.external_attr = (stat.S_IFLNK if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else stat.S_IFIFO) << 16
        out = io.BytesIO(pack(name, FILES))
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr(link, "/etc/passwd")
        body = out.getvalue()
    else:
        body = pack(name, FILES, typed("clips/link", kind))
    store = folder_of(tmp_path / "origin", {name: body})
    said = "link" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else "device or the like"
    with pytest.raises(InvalidShardError, match=f"'clips/link' is a {said}.*skip_others"):
        list(dataset(ArchiveFiles(store, [name]), tmp_path / "cache"))
    assert bytes_here(tmp_path / "cache") == (0, 0)
    assert sorted(dataset(ArchiveFiles(store, [name], skip_others=True), tmp_path / "other")) == NAMES


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    for number, kind in enumerate((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)):
        member = typed("././@LongLink", kind)
        member.size = 1 << 32
        store = folder_of(tmp_path / f"origin{number}", {"a.tar.gz": gzip.compress(member.tobuf() + bytes(1 << 20))})
        with pytest.raises(InvalidShardError, match="a header of 4294967296 bytes"):
            ArchiveFiles(store, ["a.tar.gz"]).list(tmp_path)


def test_a_compressed_tar_is_read_for_its_list_once_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    stream = Store.stream

    def counted(store: Store, key: str, *bounds: Any) -> Any:
        begun.append(key)
        return stream(store, key, *bounds)

    monkeypatch.setattr(Store, "stream", counted)
    body = pack("a.tar.gz", FILES)
    files = ArchiveFiles(folder_of(tmp_path / "origin", {"a.tar.gz": body}), ["a.tar.gz"])
    passes = []
    for _ in range(2):  # the second time as a new run would, in the same folder
        for run in (dataset(files, tmp_path / "cache"),) * 2:
            begun.clear()
            assert list(run) == NAMES
            passes.append(len(begun))
    assert passes == [2, 1, 1, 1]
    folder_of(tmp_path / "origin", {"a.tar.gz": pack("a.tar.gz", {"another.bin": b"1" * 99})})
    assert list(dataset(files, tmp_path / "cache")) == ["another.bin"], "another archive has another list"
    on_disk = [path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [one for one in on_disk if body[1000:1100] in one]


def test_bombs_and_broken_archives_are_told(tmp_path: Path) -> None:
    for number, name in enumerate(("a.tar", "a.zip", "a.tar.gz")):
        limited = source(tmp_path / f"origin{number}", name, limits=ArchiveLimits(unpacked_bytes=3 * SIZE))
        with pytest.raises(InvalidShardError, match="the limits are"):
            list(dataset(limited, tmp_path / f"cache{number}"))
        large = source(tmp_path / f"large{number}", name, {"zeros": bytes(5_000_000)})
        with pytest.raises(InvalidParamsError, match=r"'a.*zeros' has 5000000 bytes"):
            list(dataset(large, tmp_path / f"large-cache{number}"))
        body = pack(name, FILES)
        half = ArchiveFiles(folder_of(tmp_path / f"half{number}", {name: body[: len(body) // 2]}), [name])
        with pytest.raises(InvalidShardError, match="archive"):
            list(dataset(half, tmp_path / f"half-cache{number}"))
    with pytest.raises(InvalidParamsError, match="not an archive"):
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


@pytest.mark.parametrize("name", KINDS)
def test_members_of_odd_names_come_as_any_other(tmp_path: Path, name: str) -> None:
    """A member is found by its place or its name inside the archive: its name need not be a key."""
    odd = ["./a", "b//c", "d/./e", "new\nline", "back\\slash", "tab\t", "ä"]
    if ".tar" in name:
        odd += [os.fsdecode(b"latin-\xe9"), os.fsdecode(b"latin-\xe8")]
    files = {key: f"body {number}".encode() for number, key in enumerate(odd)}
    found = list(dataset(source(tmp_path / "origin", name, files), tmp_path / "cache", decode=name_and_body))
    assert sorted(body for _, body, _ in found) == sorted(files.values())
