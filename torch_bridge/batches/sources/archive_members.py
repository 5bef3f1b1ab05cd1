"""Archives as streams: what kind one is, the members of a compressed tar one after the other, bounded copies."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Literal, Self, cast

from protocol.errors import CancelledRequestError, InvalidParamsError, InvalidShardError
from torch_bridge.batches.plan import RemoteFile
from torch_bridge.batches.sources.range_file import OnBytes, StreamedFile
from torch_bridge.core.store import Store

COPY_BYTES = 1 << 20
HEADER_BYTES = 1 << 20
"""Limit of a tar's extended headers of one member (long names, pax records), which tarfile reads into memory."""
Kind = Literal["tar", "zip", "tar.gz", "tar.bz2", "tar.xz", "tar.zst"]
_KINDS: dict[str, Kind] = {
    ".tar": "tar",
    ".zip": "zip",
    ".tar.gz": "tar.gz",
    ".tgz": "tar.gz",
    ".tar.bz2": "tar.bz2",
    ".tbz2": "tar.bz2",
    ".tar.xz": "tar.xz",
    ".txz": "tar.xz",
    ".tar.zst": "tar.zst",
    ".tzst": "tar.zst",
}


def kind_of(key: str) -> Kind:
    """By its name. Raises InvalidParamsError for another."""
    for ending, kind in _KINDS.items():
        if key.lower().endswith(ending):
            return kind
    raise InvalidParamsError(f"{key!r} is not an archive that can be read here: their names end in {', '.join(_KINDS)}")


class BoundedTarInfo(tarfile.TarInfo):
    """Refuses extended headers above HEADER_BYTES: a compressed kilobyte may claim gigabytes of them.

    Opened with errors="replace": a name that is not UTF-8 cannot be in a journal, and members are found by their place.
    """

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        extended = (
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
        )
        if self.type in extended and self.size > HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes, more than {HEADER_BYTES}")
        return super()._proc_member(tar)  # type: ignore[misc, no-any-return]


def is_file(member: tarfile.TarInfo, what: str, *, skip_others: bool) -> bool:
    """Whether a member is a file, not a folder. Raises InvalidShardError, see `expect_harmless`."""
    if member.isdir():
        return False
    plain = member.isreg() and not member.issparse()
    if not plain and not skip_others:
        kind = "link" if member.issym() or member.islnk() else "sparse file" if member.isreg() else "device or the like"
        raise refused(what, member.name, f"is a {kind}")
    if plain:
        expect_harmless(member.name, what)
    return plain


def is_zipped_file(member: zipfile.ZipInfo, what: str, *, skip_others: bool) -> bool:
    """The same of a zip's member: its mode on Unix is in the upper half of its attributes, if it has one."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    if member.is_dir():
        return False
    if kind not in (0, stat.S_IFREG):
        if not skip_others:
            raise refused(what, member.filename, "is a link" if kind == stat.S_IFLNK else "is a device or the like")
        return False
    expect_harmless(member.filename, what)
    return True


def expect_harmless(name: str, what: str) -> None:
    """Raises InvalidShardError for a member whose name would lead out of the folder that it is unpacked in."""
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise refused(what, name, "leads out of the folder")


def refused(what: str, name: str, why: str) -> InvalidShardError:
    return InvalidShardError(
        f"{what}: the member {name[:200]!r} {why}; nothing of this archive is used: make it again of plain files below "
        "one folder, or, for links and devices, give ArchiveFiles skip_others=True"
    )


class MemberStream:
    """The regular files of a compressed tar, read once from its beginning."""

    def __init__(self, store: Store, key: str, kind: Kind, *, skip_others: bool = False) -> None:
        self.key = key
        self._what = f"{store.url}: {key!r}"
        self._skip_others = skip_others
        self.process = os.getpid()
        self.at = 0
        """The number of the member that comes next."""
        self._raw = StreamedFile(store.stream(key), self._what)
        self._plain = _unpacked(self._raw, kind)
        self._tar = tarfile.open(  # noqa: SIM115 - closed by close()
            fileobj=self._plain, mode="r|", tarinfo=BoundedTarInfo, errors="replace"
        )

    def until(self, stop: threading.Event) -> None:
        """From now on reading ends when this event is set."""
        self._raw.stop = stop

    def __iter__(self) -> Iterator[tuple[int, tarfile.TarInfo]]:
        while (member := self._tar.next()) is not None:
            self._tar.members = []  # type: ignore[attr-defined]  # it would keep all members
            if is_file(member, self._what, skip_others=self._skip_others):
                self.at += 1
                yield self.at - 1, member

    def open(self, member: tarfile.TarInfo) -> IO[bytes]:
        """The bytes of the last member."""
        found = self._tar.extractfile(member)
        if found is None:
            raise InvalidShardError(f"{self.key!r}: {member.name!r} is not a file")
        return found

    def close(self) -> None:
        """Close the connection; does nothing in another process, which does not own it."""
        if self.process == os.getpid():
            self._tar.close()
            self._plain.close()
            self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unpacked(raw: StreamedFile, kind: Kind) -> IO[bytes]:
    buffered = cast(IO[bytes], io.BufferedReader(raw, COPY_BYTES))
    if kind == "tar.gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=buffered))
    if kind == "tar.bz2":
        return cast(IO[bytes], bz2.BZ2File(buffered))
    if kind == "tar.xz":
        return cast(IO[bytes], lzma.LZMAFile(buffered))
    import pyarrow

    return cast(IO[bytes], pyarrow.CompressedInputStream(pyarrow.PythonFile(buffered, mode="r"), "zstd"))


def copy(member: IO[bytes], out: IO[bytes], file: RemoteFile, stop: threading.Event, on_bytes: OnBytes) -> None:
    """Copy a member, at most the declared bytes. Raises InvalidShardError if it has more or fewer."""
    done = 0
    while data := member.read(min(COPY_BYTES, file.size + 1 - done)):
        if stop.is_set():
            raise CancelledRequestError(f"{file.key!r} is not needed any more")
        done += len(data)
        if done > file.size:
            break
        out.write(data)
        on_bytes(len(data))
    if done != file.size:
        raise InvalidShardError(
            f"{file.key!r} unpacks to {'more' if done > file.size else done} bytes, {file.size} are declared: the "
            "archive is damaged or malicious; it is not used"
        )


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise InvalidShardError in place of errors of the archive libraries."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise InvalidShardError(f"{what} is damaged, or not an archive of its kind ({error}): make it again") from error
    except RuntimeError as error:  # zipfile refuses encryption and rare compressions with it
        raise InvalidShardError(f"{what} cannot be read: {error}") from error
