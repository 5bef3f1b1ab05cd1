"""Folders on a disk that several users and data sets share: whose one is, and what to do if it cannot be written."""

from __future__ import annotations

import errno
import hashlib
import os
import pwd
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from node.files import FileLock
from protocol.errors import InvalidParamsError

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_UNSAFE = re.compile(r"[^\w.-]+")


@contextmanager
def writing_to(folder: Path, setting: str) -> Iterator[None]:
    """Raise InvalidParamsError in place of the OSError of a folder that this process may not write. It names the path,
    its owner, and `setting`, the argument that chose the folder.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise InvalidParamsError(_refusal(Path(error.filename or folder), folder, error, setting)) from None


def require_writable(folder: Path, setting: str) -> None:
    """Create a folder that does not exist. Raises InvalidParamsError as `writing_to` does, OSError of the disk."""
    with writing_to(folder, setting):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            reason = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(reason, os.strerror(reason), str(folder))


def user_folder(name: str) -> Path:
    """A folder of this user's own in the temporary folder, which all users share; created if there is none.

    Raises InvalidParamsError if another user has taken its place.
    """
    top = Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}"
    with suppress(FileExistsError):
        top.mkdir(mode=0o700, parents=True)
    found = top.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise InvalidParamsError(
            f"{top} should be a folder of user {_user(os.getuid())}, and is one of {_user(found.st_uid)} or a link: "
            "have it deleted, set TMPDIR to a folder of your own, or give folder="
        )
    folder = top / name
    folder.mkdir(exist_ok=True)
    return folder


def home_of(dataset: str, folder: Path, state: Path) -> Path:
    """`folder` itself for the first data set that is kept in it, as an empty file in `state` says; for others one of
    their own in there, so that files of the same names do not meet.

    Raises InvalidParamsError as `writing_to` does, OSError of the disk.
    """
    mark = hashlib.sha256(dataset.encode()).hexdigest()[:8]
    name = f"{_UNSAFE.sub('-', dataset)[:80].lstrip('.')}-{mark}"
    with writing_to(folder, "folder"):
        state.mkdir(parents=True, exist_ok=True)
        with FileLock(state / "first.lock").held():
            if not (first := list(state.glob("*.first"))):
                first = [state / f"{name}.first"]
                first[0].touch()  # its name says it: a full disk takes that too
    return folder if first[0].stem == name else folder / name


def _refusal(path: Path, folder: Path, error: OSError, setting: str) -> str:
    if error.errno == errno.EROFS:
        return f"{path} is on a read-only file system: give a folder that can be written by {setting}="
    there = next((one for one in (path, *path.parents) if one.exists()), folder)
    owner, me = there.stat().st_uid, os.geteuid()
    if owner == me:
        return f"{path} cannot be written ({error.strerror}): make {there} writable, or give another by {setting}="
    return (
        f"{path} cannot be written by user {_user(me)} ({error.strerror}), since {there} belongs to {_user(owner)}: "
        f"give each user a folder of its own ({setting}=); to share {folder} on purpose, give it a common group "
        "(chmod g+rwxs) and both users umask 002"
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
