"""Real daemons, as `python -m node serve` runs them, for tests: on free loopback ports, always ended."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from node.cli import main
from protocol.sync_client import SyncClient
from tests.support.daemon_forks import ForkedProcess

READY_S = 30.0
CRASHES = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}


@dataclass
class Daemon:
    """One running node."""

    home: Path
    process: ForkedProcess
    ready: dict[str, Any]
    signals: set[int] = field(default_factory=set)
    """Sent by `end`."""

    @property
    def node_id(self) -> str:
        return str(self.ready["node_id"])

    @property
    def ports(self) -> dict[str, int]:
        return dict(self.ready["ports"])

    @property
    def log(self) -> str:
        return (self.home / "node.log").read_text(errors="replace")

    def call(
        self, method: str, params: dict[str, Any] | None = None, *, host: str = "127.0.0.1", **options: Any
    ) -> Any:
        with SyncClient(host, self.ports["rpc"]) as client:
            return client.call(method, params or {}, timeout_s=100, **options)

    def files(self) -> dict[str, dict[str, Any]]:
        return {file["filename"]: file for file in self.call("LIST_FILES")["files"]}

    def end(self, number: int = signal.SIGTERM) -> float:
        """Send a signal; return how many seconds the process took to end. Raises TimeoutExpired after 10 s."""
        started = time.monotonic()
        self.signals.add(number)
        self.process.send_signal(number)
        self.process.wait(10)
        return time.monotonic() - started


@contextlib.contextmanager
def daemon(home: Path, *arguments: str, bootstrap: Daemon | None = None, **environment: str) -> Iterator[Daemon]:
    """Start a node and wait for its ready line. A node that crashes fails the test, with the end of its log."""
    home.mkdir(parents=True, exist_ok=True)
    command = ["serve", "--data-dir", str(home), "--threads", "1", "--ctx-size", "512"]
    for port in ("rpc", "dht", "bt", "http"):
        command += [f"--{port}-port", "0"]
    if bootstrap:
        command += ["--bootstrap", f"127.0.0.1:{bootstrap.ports['dht']}"]
    with (home / "node.log").open("ab") as log:
        process = ForkedProcess([*command, *arguments], log, os.environ | environment)
    node = Daemon(home, process, {})
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], READY_S)
        line = process.stdout.readline() if readable else b""
        assert line, f"the node did not get ready:\n{_tail(home)}"
        node.ready = json.loads(line)
        yield node
    except Exception as err:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its connections end before the process does
            process.wait(0.3)
        if process.returncode:
            err.add_note(f"the node had ended with status {process.returncode}; its log ends:\n{_tail(home)}")
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(8)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)
        assert process.stdout is not None
        process.stdout.close()
        crashes = CRASHES - {-number for number in node.signals}
        assert process.returncode not in crashes, f"the node crashed ({process.returncode}):\n{_tail(home)}"


def _tail(home: Path) -> str:
    return (home / "node.log").read_text(errors="replace")[-6000:]


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in this process: a new one takes a second to import what it needs."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    return subprocess.CompletedProcess(["shoal", *arguments], code, out.getvalue(), err.getvalue())
