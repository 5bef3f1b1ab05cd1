"""Archives as streams: what kind one is, the members of a compressed tar one after the other, bounded copies."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Literal, Self, cast

from protocol.errors import CancelledRequestError, InvalidParamsError, InvalidShardError
from torch_bridge.batches.plan import RemoteFile
from torch_bridge.batches.ranged import OnBytes, StreamedFile
from torch_bridge.stores import Store

COPY_BYTES = 1 << 20
Kind = Literal["tar", "zip", "tar.gz", "tar.bz2", "tar.xz", "tar.zst"]
_KINDS: dict[str, Kind] = {
    ".tar": "tar", ".zip": "zip", ".tar.gz": "tar.gz", ".tgz": "tar.gz", ".tar.bz2": "tar.bz2", ".tbz2": "tar.bz2",
    ".tar.xz": "tar.xz", ".txz": "tar.xz", ".tar.zst": "tar.zst", ".tzst": "tar.zst",
}  # fmt: skip


def kind_of(key: str) -> Kind:
    """By its name. Raises InvalidParamsError for another."""
    for ending, kind in _KINDS.items():
        if key.lower().endswith(ending):
            return kind
    raise InvalidParamsError(f"{key!r} is no archive that can be read here: their names end in {', '.join(_KINDS)}")


class MemberStream:
    """The regular files of a compressed tar, once, from its begin."""

    def __init__(self, store: Store, key: str, kind: Kind) -> None:
        self.key = key
        self.process = os.getpid()
        self.at = 0
        """The number of the member that comes next."""
        self._raw = StreamedFile(store.stream(key), f"{store.url}: {key!r}")
        self._plain = _unpacked(self._raw, kind)
        self._tar = tarfile.open(fileobj=self._plain, mode="r|")  # noqa: SIM115 - closed by close()

    def until(self, stop: threading.Event) -> None:
        """From now on it is read for a fetch that this event ends."""
        self._raw.stop = stop

    def __iter__(self) -> Iterator[tuple[int, tarfile.TarInfo]]:
        while (member := self._tar.next()) is not None:
            self._tar.members = []  # type: ignore[attr-defined]  # it would keep all that it has seen
            if member.isreg() and not member.issparse():
                self.at += 1
                yield self.at - 1, member

    def open(self, member: tarfile.TarInfo) -> IO[bytes]:
        """The bytes of the member that was given last."""
        found = self._tar.extractfile(member)
        if found is None:
            raise InvalidShardError(f"{self.key!r}: {member.name!r} is no file")
        return found

    def close(self) -> None:
        """Let go of the connection; nothing happens in another process, whose it is not."""
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
    """All bytes of a member, never more than were declared. Raises InvalidShardError where it has more or fewer."""
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
            f"{file.key!r} unpacks to {'more' if done > file.size else done} bytes, declared are {file.size}: the "
            "archive is damaged or made to harm; it is not used"
        )


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Foreign errors as ours."""
    try:
        yield
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise InvalidShardError(f"{what} is no whole archive of its kind ({error}): make it again") from error
    except (RuntimeError, NotImplementedError) as error:  # how zipfile refuses encryption and rare compressions
        raise InvalidShardError(f"{what} cannot be read: {error}") from error
