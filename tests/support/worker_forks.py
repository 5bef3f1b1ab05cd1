"""Workers of pytest-xdist, forked from one process that has imported what the tests import.

Importing torch and the rest takes each new interpreter some eight seconds, before its first test. `start` runs that
process; `python worker_forks.py SOCKET -u -c CODE` stands for one worker's interpreter: it hands its standard streams
to the process, which forks a child that runs CODE, and ends as that child ends.
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
import types
from pathlib import Path

MAX_REQUEST_BYTES = 1 << 20
STATUS = 4
IMPORTED = ("node", "protocol", "torch_bridge", "scripts")
ALSO_IMPORTED = (
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch.optim",
    "torch._dynamo",  # the first optimizer imports it
    "torchdata.stateful_dataloader",
    "hypothesis.stateful",
    "pyarrow.parquet",
    "safetensors.torch",
)


class WorkerForks:
    """The process that forks, as the controller of pytest-xdist sees it: it ends with the controller."""

    def __init__(self, folder: Path) -> None:
        path = folder / "workers.sock"
        read, self._write = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
            listener.listen()
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "tests.support.worker_forks", str(listener.fileno()), str(read)],
                pass_fds=[listener.fileno(), read],
            )
        os.close(read)
        self.interpreter = [sys.executable, "-S", "-E", __file__, str(path)]
        """In place of `python` in a worker's command."""

    def close(self) -> None:
        os.close(self._write)
        self._process.wait()


def _stand_for(path: str, code: str) -> int:
    """The exit status of the child that runs the code with this process's streams, folder and environment."""
    request = json.dumps({"code": code, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    assert len(request) < MAX_REQUEST_BYTES
    read, write = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.connect(path)
        socket.send_fds(channel, [request], [0, 1, 2, write])
    for descriptor in (0, 1, write):  # the worker's ends of its pipes are the only ones
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = os.read(read, 16)
    return int(status) if status else 1


def _serve(listener: socket.socket, controller: int) -> None:
    """Fork a child for each request until the controller has ended; returns in the children too, after their code."""
    while True:
        if controller in select.select([listener, controller], [], [])[0]:
            return
        channel, _ = listener.accept()
        with channel:
            request, descriptors, _, _ = socket.recv_fds(channel, MAX_REQUEST_BYTES, STATUS)
        if not request:
            continue
        if not os.fork():
            listener.close()
            os.close(controller)
            _monitor(json.loads(request), descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)


def _monitor(request: dict[str, object], descriptors: list[int]) -> None:
    """Run the code in a child and report its exit status. Returns in that child."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, status = descriptors
    pid = os.fork()
    if not pid:
        os.close(status)
        _run(str(request["code"]), request["environment"], str(request["folder"]), streams)
        return
    for descriptor in (0, 1, *streams):
        os.close(descriptor)
    _, ended = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(status, b"%d" % (os.waitstatus_to_exitcode(ended) & 0xFF))
    os._exit(0)


def _run(code: str, environment: object, folder: str, streams: list[int]) -> None:
    """What `python -u -c CODE` does, in a process that has its modules already."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)  # type: ignore[call-overload]
    os.chdir(folder)
    sys.argv = ["-c"]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _import_what_tests_import() -> None:
    import gc
    import importlib
    import pkgutil

    gc.disable()
    for name in IMPORTED:
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not module.name.endswith("__main__"):
                with contextlib.suppress(ImportError):  # its tests say what is missing
                    importlib.import_module(module.name)
    for name in ALSO_IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.enable()
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _import_what_tests_import()
        _serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
    else:
        sys.exit(_stand_for(sys.argv[1], sys.argv[-1]))
