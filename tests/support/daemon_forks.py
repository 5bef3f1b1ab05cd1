"""Daemons forked from one process that has imported what a daemon imports: a start costs a tenth of a new interpreter.

`python -m tests.support.daemon_forks FD` is that process. It runs no thread and opens nothing. For each start it forks
a monitor, which forks the daemon, waits for its end and reports the status. The daemon runs the same `main` that
`python -m node` runs, with descriptors, environment and signals of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

MAX_REQUEST_BYTES = 1 << 20


class ForkedProcess:
    """What tests use of `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], stderr: IO[bytes], environment: Mapping[str, str]) -> None:
        self.args = list(arguments)
        self.returncode: int | None = None
        read, write = os.pipe()
        self.stdout = os.fdopen(read, "rb")
        self._status, status_write = os.pipe()
        request = json.dumps({"arguments": self.args, "environment": dict(environment), "folder": os.getcwd()})
        try:
            _server().send(request.encode(), [write, stderr.fileno(), status_write])
        finally:
            os.close(write)
            os.close(status_write)
        self.pid = int(self._line())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self._ended()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._ended()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self) -> None:
        self.returncode = int(self._line())
        os.close(self._status)

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._status, 1)
            assert byte, "the process that forks daemons has ended"
            line += byte
        return line


class _Server:
    """The process that forks, as its user sees it."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.owner = os.getpid()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.daemon_forks", str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )

    def send(self, request: bytes, descriptors: list[int]) -> None:
        assert len(request) < MAX_REQUEST_BYTES
        socket.send_fds(self.socket, [request], descriptors)


_servers: list[_Server] = []


def _server() -> _Server:
    if not _servers or _servers[0].owner != os.getpid():  # a forked test process has one of its own
        _servers[:] = [_Server()]
    return _servers[0]


def _serve(channel: socket.socket) -> None:
    """Fork a monitor for each request, until the other side has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        request, descriptors, _, _ = socket.recv_fds(channel, MAX_REQUEST_BYTES, 3)
        if not request:
            return
        if not os.fork():
            channel.close()
            _monitor(json.loads(request), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _monitor(request: dict[str, Any], stdout: int, stderr: int, status: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        os.close(status)
        _daemon(request, stdout, stderr)
    os.close(stdout)
    os.close(stderr)
    os.write(status, b"%d\n" % pid)
    while True:
        with contextlib.suppress(InterruptedError):
            _, ended = os.waitpid(pid, 0)
            break
    with contextlib.suppress(BrokenPipeError):
        os.write(status, b"%d\n" % os.waitstatus_to_exitcode(ended))
    os._exit(0)


def _daemon(request: dict[str, Any], stdout: int, stderr: int) -> None:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        null = os.open(os.devnull, os.O_RDONLY)
        for descriptor, number in ((null, 0), (stdout, 1), (stderr, 2)):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = ["shoal", *request["arguments"]]
        from node.cli import main

        main(request["arguments"])
        code = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    import gc

    from node.cli.app import build_app

    build_app(["serve"])
    gc.collect()
    gc.freeze()
    _serve(socket.socket(fileno=int(sys.argv[1])))
