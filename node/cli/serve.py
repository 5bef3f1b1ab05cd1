"""`serve`: the daemon, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
import os
import platform
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

from node.cli.console import examples, fail
from node.cli.options import with_settings
from node.config import Settings, is_loopback, unknown_variables
from node.files import DataDirInUseError, data_dir_lock
from protocol.errors import ShoalError, UnsupportedPlatformError

if TYPE_CHECKING:
    from node.node import NodePorts

log = logging.getLogger("node")

MIN_GLIBC = (2, 34)
SHUTDOWN_LIMIT_S = 4.5
"""After this a shutdown that hangs is cut short; 5 s are promised."""
_CHATTY = ("watchfiles", "kademlia", "rpcudp", "aiohttp", "asyncio")
"""Libraries whose INFO is noise to a node's operator."""

_TOML_EXAMPLE = """

\b
A TOML file:
  data_dir = "~/shoal"
  rpc_port = 7500
  bootstrap = ["10.0.0.5:7401"]
  upload_limit = "8MB"
"""
EPILOG = (
    examples(
        "shoal --data-dir ~/shoal --shards-dir ~/models",
        "shoal --listen 10.0.0.6 --insecure-listen --bootstrap 10.0.0.5:7401",
        "shoal --config shoal.toml --assign smol:1,2",
        "shoal --origin o3://bucket/shoal --manifest o3://bucket/shoal/manifests/smol/",
        'SHOAL_BOOTSTRAP="10.0.0.5:7401 10.0.0.7:7401" SHOAL_UPLOAD_LIMIT=8MB shoal',
    )
    + _TOML_EXAMPLE
)


def run_daemon(settings: Settings) -> None:
    """Run the daemon: seed the shards here, answer RPC, run stages.

    One line of JSON on stdout says when it is ready, and on which ports; the log goes to stderr. SIGTERM or Ctrl-C
    ends it. Credentials of origins come from the environment alone: AKAVE_O3_ACCESS_KEY, AKAVE_O3_SECRET_KEY,
    AKAVE_PRIVATE_KEY, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, HF_TOKEN, or files named by those with _FILE.

    Precedence, highest first: flag, environment variable, TOML file, default. The variable of --rpc-port is
    SHOAL_RPC_PORT, and so on; lists are separated by spaces. The file is --config, SHOAL_CONFIG or
    ~/.config/shoal/config.toml; its keys are the flags' names with underscores (of --origin and --manifest: origins,
    manifests).
    """
    check_platform()
    _log_to_stderr(settings.log_level.upper())
    faulthandler.enable()  # a native library that crashes leaves in the log what every thread was in
    for name in unknown_variables():
        log.warning("%s is not a setting of a node, and is ignored; `shoal serve --help` lists them", name)
    warn_if_reachable(settings)
    try:
        with data_dir_lock(settings.data_dir):
            asyncio.run(_until_signal(settings))
    except (DataDirInUseError, ShoalError) as error:
        fail(error)
    except OSError as error:
        what = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror or str(error)
        fail(f"{error.filename}: {what}" if error.filename else what)
    except Exception as error:
        log.critical("the node stopped because a part of it failed", exc_info=error)
        sys.exit(1)


serve = with_settings(run_daemon)


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    if level != "DEBUG":
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)


def warn_if_reachable(settings: Settings) -> None:
    """Say at every start that anyone who reaches the node can use it."""
    if not is_loopback(settings.listen):
        log.warning(
            "listening on %s without a cluster identity: whoever reaches it can read shards, load models and run tasks",
            settings.listen,
        )


def check_platform() -> None:
    """Raise UnsupportedPlatformError if a native library that a node needs has no wheel here."""
    machine, (libc, version) = platform.machine(), platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if sys.platform != "linux" or machine != "x86_64" or libc != "glibc" or numbers < MIN_GLIBC:
        raise UnsupportedPlatformError(
            f"a node needs Linux on x86-64 with glibc 2.34 or newer (tensor_iroh has no other wheel); this is "
            f"{sys.platform} on {machine} with {libc or 'an unknown libc'} {version}. `call`, `nodes`, `status` and "
            "`generate` work from here against a node elsewhere"
        )


async def _until_signal(settings: Settings) -> None:
    from node.node import run_node  # after check_platform: its imports would fail with a traceback

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end(number: int) -> None:
        if stop.is_set():
            log.warning("second signal: leaving at once")
            os._exit(128 + number)
        log.info("%s: shutting down", signal.Signals(number).name)
        last_resort = threading.Timer(SHUTDOWN_LIMIT_S, _leave_now)
        last_resort.daemon = True
        last_resort.start()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end, number)
    is_ready = False

    def on_ready(ready: NodePorts) -> None:
        nonlocal is_ready
        is_ready = True
        _announce_ready(ready, settings)

    try:
        await run_node(settings, stop=stop, on_ready=on_ready)
    except Exception as error:
        if not is_ready:  # a taken port or the like, said in one line
            raise
        log.critical("the node stopped because a part of it failed", exc_info=error)
        sys.exit(1)
    log.info("stopped")


def _announce_ready(ready: NodePorts, settings: Settings) -> None:
    log.info(
        "node %s of cluster %s is ready: rpc %s:%d, shards in %s",
        ready.node_id[:16],
        settings.cluster,
        settings.listen,
        ready.rpc_port,
        settings.shards_dir,
    )
    ports = {"rpc": ready.rpc_port, "dht": ready.dht_port, "bt": ready.bt_port, "http": ready.http_port}
    sys.stdout.write(json.dumps({"event": "ready", "node_id": ready.node_id, "ports": ports}) + "\n")
    sys.stdout.flush()
    if sys.stdout.isatty():
        _print_next(ready, settings)


def _print_next(ready: NodePorts, settings: Settings) -> None:
    """What a person can type now; a program reads the ready line alone."""
    here = f"127.0.0.1:{ready.rpc_port}" if settings.listen == "0.0.0.0" else f"{settings.listen}:{ready.rpc_port}"
    has_model = any(settings.shards_dir.glob("*/manifest.json"))
    lines = ["", "Next, in another terminal (docs/ has more; Ctrl-C ends this node):", f"  shoal status {here}"]
    if has_model:
        lines.append(f'  shoal generate {here} --prompt "Why is the sky blue?"')
    else:
        lines.append(f"  shoal split model.gguf --out {settings.shards_dir}/my-model --shards 3 --model my-model")
    if is_loopback(settings.listen):
        ports = " ".join(f"--{port}-port 0" for port in ("rpc", "dht", "bt", "http"))
        lines.append(f"  shoal --data-dir ~/shoal-2 {ports} --bootstrap {settings.listen}:{ready.dht_port}")
    else:
        host = settings.advertise or (settings.listen if settings.listen != "0.0.0.0" else socket.gethostname())
        lines += [
            "and on another machine:",
            f"  shoal --listen 0.0.0.0 --insecure-listen --bootstrap {host}:{ready.dht_port}",
        ]
    print("\n".join(lines), flush=True)


def _leave_now() -> None:
    log.error("a part did not stop within %.1f s: leaving without it", SHUTDOWN_LIMIT_S)
    os._exit(1)
