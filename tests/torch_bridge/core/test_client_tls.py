"""TLS: whom both clients of S3 trust; a fork while a connection is open, in which the child says not even good-bye."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.support.bridge.o3_client import BODY, served
from tests.support.origins.odd_bucket import odd_bucket
from tests.support.origins.servers import close_server, raw_server

PROGRAM = """
import gc, os, sys
from torch_bridge import O3Client
client = O3Client()
store = client.at(sys.argv[1])
size = len(store.get("a"))
child = os.fork()
if child == 0:
    fresh = O3Client().at(sys.argv[1])
    assert len(fresh.get("a")) == size
    assert len(store.get_range("a", 5, 10)) == 5
    del client, store, fresh
    gc.collect()
    sys.exit(0)  # the whole end of an interpreter, as of a child that was made by os.fork
_, status = os.waitpid(child, 0)
for _ in range(3):
    assert len(store.get("a")) == size
print(status, size)
"""


def certificate(folder: Path) -> Path:
    """A file with a key and its own certificate, for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(*pem) + made.public_bytes(serialization.Encoding.PEM))
    return path


@asynccontextmanager
async def tls(port: int, pem: Path, accepted: list[object]) -> AsyncIterator[int]:
    """TLS in front of a server of this machine; its port. `accepted` gets an entry for each connection."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)

    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(None)
        behind, to = await asyncio.open_connection("127.0.0.1", port)
        writers.extend((writer, to))
        await asyncio.gather(pump(reader, to), pump(behind, writer))

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        await close_server(listening, writers)
        await asyncio.sleep(0.05)


def test_a_child_does_not_end_its_parents_tls_connection(tmp_path: Path) -> None:
    pem, accepted = certificate(tmp_path), list[object]()
    with served(raw_server(BODY)) as web, served(tls(web.port, pem, accepted)) as port:
        environment = os.environ | {"SSL_CERT_FILE": str(pem)}
        command = [sys.executable, "-c", PROGRAM, f"https://127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False, env=environment)
    assert (done.stdout, done.stderr) == (f"0 {len(BODY)}\n", "")
    assert len(accepted) == 3, "the parent's one went on; two are the child's"


TRUSTS = """
import sys
from torch_bridge import O3Client
store = O3Client(endpoint=sys.argv[1], access_key="access", secret_key="a-secret-key", backend="gateway").at("o3://shards")
print([info.key for info in store.list()], store.get("a").decode())
"""


def test_reading_and_listing_trust_the_same_authorities(tmp_path: Path) -> None:
    """obstore reads and botocore lists: SSL_CERT_FILE counts for both, and AWS_CA_BUNDLE does not take its place."""
    pem = certificate(tmp_path)
    (tmp_path / "other").mkdir()
    other = certificate(tmp_path / "other")
    with served(odd_bucket({"a": b"content"})) as bucket, served(tls(bucket.port, pem, [])) as port:
        environment = os.environ | {"SSL_CERT_FILE": str(pem), "AWS_CA_BUNDLE": str(other)}
        command = [sys.executable, "-c", TRUSTS, f"https://127.0.0.1:{port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=False, env=environment)
    assert (done.stdout, done.stderr) == ("['a'] content\n", "")
