"""The folder that a cut goes into: written under temporary names, renamed when complete.

One writer at a time holds a lock on the folder. Until `commit` nothing in it changes; a run that was killed leaves a
folder `.split-...`, which the next one removes.
"""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from node.files import FileLock, fsync_dir, fsync_file, replace_file
from node.formats.gguf import read_gguf
from node.formats.gguf_file import GgufFile
from protocol.errors import InsufficientDiskError, InvalidParamsError, InvalidShardError
from protocol.manifest import MANIFEST_FILENAME

_SHARD_NAME = re.compile(r"^shard-\d+\.gguf\Z")
_PREFIX = ".split-"
_SPARE_BYTES = 1 << 20
_IDENTITY = ("general.architecture", "general.name", "general.file_type", "shoal.model.n_layers")


class SplitTarget:
    """An open, locked target folder."""

    def __init__(self, out_dir: Path, temp_dir: Path) -> None:
        self._out_dir = out_dir
        self._temp_dir = temp_dir

    @classmethod
    @contextmanager
    def open(cls, out_dir: Path, model: GgufFile, needed_bytes: int) -> Iterator[SplitTarget]:
        """Lock the folder (made if missing), check its contents, and check that the disk has room.

        Raises InvalidParamsError if it holds another model or is being written, InsufficientDiskError if `needed_bytes`
        do not fit or the disk fills up meanwhile.
        """
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InvalidParamsError(f"{out_dir} is not a folder: give another --out") from None
        lock = FileLock(out_dir)
        if not lock.try_acquire():
            raise InvalidParamsError(f"another split is writing into {out_dir}: wait for it")
        try:
            _check_contents(out_dir, model)
            for stale in out_dir.glob(f"{_PREFIX}*"):
                shutil.rmtree(stale, ignore_errors=True)
            _check_space(out_dir, needed_bytes)
            temp_dir = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=out_dir))
            try:
                yield cls(out_dir, temp_dir)
            except OSError as err:
                if err.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise _no_space(out_dir, needed_bytes) from err
                raise
            finally:
                shutil.rmtree(temp_dir, ignore_errors=True)
        finally:
            lock.release()

    def temporary(self, filename: str) -> Path:
        """The path of a file until `commit`."""
        return self._temp_dir / filename

    @contextmanager
    def create(self, filename: str) -> Iterator[BinaryIO]:
        """A new file under its temporary name, on the disk when the block ends."""
        with self.temporary(filename).open("xb") as out:
            yield out
        fsync_file(self.temporary(filename))

    def commit(self, shards: list[str], manifest: str) -> None:
        """Rename the files into place, the manifest last; remaining shards of an earlier cut are deleted.

        A crash in the middle leaves complete shards without a manifest: cutting again mends that.
        """
        (self._out_dir / manifest).unlink(missing_ok=True)
        for old in self._out_dir.iterdir():
            if _SHARD_NAME.match(old.name) and old.name not in shards:
                old.unlink()
        for filename in shards:
            replace_file(self.temporary(filename), self._out_dir / filename)
        fsync_dir(self._out_dir)
        replace_file(self.temporary(manifest), self._out_dir / manifest)
        fsync_dir(self._out_dir)


def _check_contents(out_dir: Path, model: GgufFile) -> None:
    """Raise InvalidParamsError unless every shard and manifest in the folder comes from an earlier cut of `model`."""
    existing = sorted(path for path in out_dir.iterdir() if _SHARD_NAME.match(path.name))
    advice = "give another --out, or remove it first"
    for path in existing:
        if path.resolve() == model.path.resolve():
            raise InvalidParamsError(f"{path} is the model to cut and would be overwritten: {advice}")
        try:
            found = read_gguf(path)
        except (InvalidShardError, OSError) as err:
            raise InvalidParamsError(
                f"{path} is there already and is not a shard of this model ({err}): {advice}"
            ) from None
        for key in _IDENTITY[:-1]:
            if _plain(found, key) != _plain(model, key):
                raise InvalidParamsError(
                    f"{path} is of another model: its {key} is {_plain(found, key)!r}, this one's is "
                    f"{_plain(model, key)!r}; {advice}"
                )
        if _IDENTITY[-1] not in found.metadata:
            raise InvalidParamsError(f"{path} is there already and no split wrote it: {advice}")
    manifest = out_dir / MANIFEST_FILENAME
    if not existing and manifest.exists():
        raise InvalidParamsError(f"{manifest} describes other files: {advice}")


def _plain(gguf: GgufFile, key: str) -> object:
    found = gguf.metadata.get(key)
    return None if found is None else found.value


def _check_space(out_dir: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(out_dir).free < needed_bytes + _SPARE_BYTES:
        raise _no_space(out_dir, needed_bytes)


def _no_space(out_dir: Path, needed_bytes: int) -> InsufficientDiskError:
    free = shutil.disk_usage(out_dir).free
    return InsufficientDiskError(
        f"the shards need {needed_bytes} bytes in {out_dir} and {free} are free: free some, or give another --out",
        {"needed_bytes": needed_bytes, "free_bytes": free},
    )
