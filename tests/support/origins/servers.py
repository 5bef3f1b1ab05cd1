"""Servers that stand for an origin, on loopback: JuiceFS's gateway, a misbehaving web server, a stand-in of the Hub."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from node.cli.demo.nodes import ended_with_parent
from node.cli.demo.s3_server import S3Server
from node.origin.core.credentials import Credentials, Secret
from node.origin.interface import ObjectStore
from node.origin.settings import OriginSettings
from tests.support.ports import free_port

PART_BYTES = 5 << 20
"""Parts of an upload: SeaweedFS and MinIO's code refuse smaller ones, as Amazon does."""
QUICK = {
    "connect_timeout_s": 2.0,
    "read_timeout_s": 2.0,
    "timeout_s": 20.0,
    "retry_total_s": 4.0,
}
PATIENT: dict[str, object] = {
    "connect_timeout_s": 10.0,
    "read_timeout_s": 20.0,
    "timeout_s": 60.0,
    "retry_total_s": 5.0,
    "s3_part_bytes": PART_BYTES,
}
"""For servers that answer: this machine may be busy."""


def s3_settings(endpoint: str, access_key: str, secret_key: str, **others: object) -> OriginSettings:
    """Settings with one key pair for o3:// and s3://, both at `endpoint`."""
    access, secret = Secret(access_key), Secret(secret_key)
    credentials = Credentials(o3_access_key=access, o3_secret_key=secret, s3_access_key=access, s3_secret_key=secret)
    return OriginSettings(o3_endpoint=endpoint, s3_endpoint=endpoint, credentials=credentials, **(QUICK | others))  # type: ignore[arg-type]


def settings_of(weed: S3Server, **others: object) -> OriginSettings:
    """Settings for SeaweedFS."""
    return s3_settings(weed.endpoint, weed.access_key, weed.secret_key, **(PATIENT | others))


async def streamed(store: ObjectStore, key: str, start: int = 0, end: int | None = None) -> bytes:
    """All bytes of a stream."""
    return b"".join([data async for data in store.get_stream(key, start, end)])


def in_parts(count: int) -> int:
    """The size of an object that goes in so many parts, at least three, the last one short."""
    return (count - 1) * PART_BYTES + 12_345


@asynccontextmanager
async def juicefs_gateway(folder: Path) -> AsyncIterator[OriginSettings]:
    """MinIO's code over a folder, with one bucket, `shards`."""
    program = str(Path(sys.executable).with_name("juicefs"))
    meta = f"sqlite3://{folder}/meta.db"
    form = [program, "format", meta, "shards", "--storage", "file", "--bucket", f"{folder}/data/", "--trash-days", "0"]
    await asyncio.to_thread(subprocess.run, form, check=True, capture_output=True, timeout=30)
    port = free_port()
    with (folder / "gateway.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *ended_with_parent([
                program, "gateway", meta, f"127.0.0.1:{port}", "--no-usage-report", "--keep-etag", "--no-banner",
                "--cache-dir", str(folder / "cache"), "--metrics", "127.0.0.1:0", "--log", str(folder / "juicefs.log"),
            ], signal.SIGKILL),
            stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"MINIO_ROOT_USER": "gateway", "MINIO_ROOT_PASSWORD": "gateway-secret"},
        )  # fmt: skip
    try:
        async with asyncio.timeout(20):
            while await _status(port, "/minio/health/live") != 200:
                assert process.returncode is None, (folder / "gateway.log").read_text()[-2000:]
                await asyncio.sleep(0.05)
        yield s3_settings(f"http://127.0.0.1:{port}", "gateway", "gateway-secret", **PATIENT)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _status(port: int, path: str) -> int:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return 0
    writer.write(f"GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode())
    words = (await reader.readline()).split()
    writer.close()
    return int(words[1]) if len(words) > 1 else 0


@dataclass
class RawServer:
    """A web server with one object at every path, which answers as `modes` say; S3 clients can read it too."""

    body: bytes
    port: int = 0
    modes: list[str] = field(default_factory=list)
    """One for each answer to come; the last one is used again. Empty: correct answers."""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path and headers of each request."""
    given: list[tuple[int, int]] = field(default_factory=list)
    """Which bytes of the object each answer announced."""
    location: str = ""
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._one(reader, writer):
                await writer.drain()
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        left = int(headers.get("content-length", "0"))
        while left:
            if self.modes == ["reads-slowly"]:
                await asyncio.sleep(0.02)
            left -= len(await reader.read(min(left, 100_000)))
        self.requests.append((method, path, headers))
        mode = self.modes.pop(0) if len(self.modes) > 1 else (self.modes or ["ok"])[0]
        if mode.isdecimal():
            extra = "Retry-After: 1\r\n" if mode == "429" else f"Location: {self.location}\r\n" if mode == "302" else ""
            writer.write(f"HTTP/1.1 {mode} Status\r\n{extra}Content-Length: 0\r\n\r\n".encode())
            return True
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", "")) if mode != "ignores-range" else None
        start = int(wanted[1]) if wanted else 0
        end = min(int(wanted[2]) + 1, len(self.body)) if wanted and wanted[2] else len(self.body)
        data, length = self.body[start:end], end - start
        shift = 7 if mode == "other-range" else 0
        if mode == "short":
            data, length = data[:-10], length - 10
        answer = f"HTTP/1.1 {'206 Partial' if wanted else '200 OK'}\r\nContent-Length: {length}\r\n"
        answer += 'ETag: "abc"\r\nLast-Modified: Wed, 21 Oct 2015 07:28:00 GMT\r\n'
        if wanted:
            answer += f"Content-Range: bytes {start + shift}-{end + shift - 1}/{len(self.body)}\r\n"
        writer.write(f"{answer}\r\n".encode())
        if method == "HEAD":
            return True
        self.given.append((start, end))
        writer.write(data[: length * 2 // 3] if mode in ("breaks-off", "hangs") else data)
        if mode == "hangs":
            await writer.drain()
            await asyncio.sleep(5)
        return mode not in ("breaks-off", "hangs")


@asynccontextmanager
async def raw_server(body: bytes, *modes: str) -> AsyncIterator[RawServer]:
    """A RawServer that runs."""
    server = RawServer(body, modes=list(modes))
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    async with listening:
        try:
            yield server
        finally:
            await close_server(listening, server.writers)


async def close_server(listening: asyncio.Server, writers: list[asyncio.StreamWriter]) -> None:
    """Close a server and all of its connections."""
    listening.close()
    await asyncio.sleep(0.01)  # a connection that was accepted already has its writer then
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(0)


@dataclass
class HubStandIn:
    """The part of the Hugging Face Hub's API that a reader uses, for one repository. Large files are behind a redirect
    to another server, as at the Hub."""

    files: dict[str, bytes]
    elsewhere: str
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    token: str | None = None
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    before: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """The files of older commits."""
    statuses: list[int] = field(default_factory=list)
    """The statuses of the next answers to requests for a file's bytes; then answers are correct."""
    port: int = 0
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def push(self, commit: str, files: dict[str, bytes]) -> None:
        """Make the branch mean another commit; the one before can still be read."""
        self.before[self.commit] = self.files
        self.commit, self.files = commit, files

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
                method, path, _ = first.split(" ")
                headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
                self.requests.append((method, path, headers))
                asked = await reader.readexactly(int(headers.get("content-length", "0")))
                status, extra, body = self._answer(path, headers, asked)
                length = extra.pop("Content-Length", str(len(body)))
                head = "".join(f"{name}: {value}\r\n" for name, value in extra.items())
                writer.write(f"HTTP/1.1 {status} Status\r\n{head}Content-Length: {length}\r\n\r\n".encode())
                writer.write(b"" if method == "HEAD" else body)
                await writer.drain()
        writer.close()

    def _answer(self, target: str, headers: dict[str, str], asked: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.token is not None and headers.get("authorization") != f"Bearer {self.token}":
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
        api, repo = "/api/datasets/some/data", "/datasets/some/data/resolve/"
        commits = self.before | {self.commit: self.files}
        if path in (f"{api}/revision/main", f"{api}/revision/v1", api):
            return 200, {}, json.dumps({"id": "some/data", "sha": self.commit, "siblings": [], "tags": []}).encode()
        for commit, files in commits.items():
            if path == f"{api}/revision/{commit}":
                return 200, {}, json.dumps({"id": "some/data", "sha": commit, "siblings": [], "tags": []}).encode()
            if path.startswith(f"{api}/tree/{commit}"):
                folder = unquote(path.removeprefix(f"{api}/tree/{commit}")).strip("/")
                inside = f"{folder}/" if folder else ""
                found = self._entries(files, inside, deep=query.get("recursive", ["false"])[0].lower() == "true")
                return (
                    (200, {}, json.dumps(found).encode()) if found else (404, {"X-Error-Code": "EntryNotFound"}, b"{}")
                )
            if path == f"{api}/paths-info/{commit}":
                names = [name for name in parse_qs(asked.decode()).get("paths", []) if name in files]
                return 200, {}, json.dumps([self._entry(files, name) for name in names]).encode()
        commit, _, quoted = path.removeprefix(repo).partition("/")
        files, name = commits.get(commit, {}), unquote(quoted)
        if not path.startswith(repo) or name not in files:
            return 404, {"X-Error-Code": "EntryNotFound" if path.startswith(repo) else "RepoNotFound"}, b""
        if self.statuses:
            return self.statuses.pop(0), {}, b""
        body = files[name]
        described = {"X-Repo-Commit": commit, "ETag": f'"{_sha1(body)}"'}
        if self.elsewhere and name.endswith(".bin"):
            linked = {"X-Linked-Size": str(len(body)), "X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"'}
            return 302, described | linked | {"Location": f"{self.elsewhere}/blob?signature=secret"}, b""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        if not wanted:
            return 200, described, body
        start, end = int(wanted[1]), min(int(wanted[2] or len(body)) + 1, len(body))
        return 206, described | {"Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}, body[start:end]

    def _entries(self, files: dict[str, bytes], inside: str, *, deep: bool) -> list[dict[str, object]]:
        names = [name for name in files if name.startswith(inside)]
        if deep:
            return [self._entry(files, name) for name in names]
        folders = sorted({name[len(inside) :].partition("/")[0] for name in names if "/" in name[len(inside) :]})
        found: list[dict[str, object]] = [
            {"type": "directory", "path": inside + folder, "oid": "0" * 40, "size": 0} for folder in folders
        ]
        return found + [self._entry(files, name) for name in names if "/" not in name[len(inside) :]]

    def _entry(self, files: dict[str, bytes], name: str) -> dict[str, object]:
        body = files[name]
        found: dict[str, object] = {"type": "file", "path": name, "size": len(body), "oid": _sha1(body)}
        if self.elsewhere and name.endswith(".bin"):
            found["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
        return found


@asynccontextmanager
async def hub_stand_in(
    files: dict[str, bytes], elsewhere: str = "", token: str | None = None
) -> AsyncIterator[HubStandIn]:
    """A HubStandIn that runs; `elsewhere` is the URL of the server that has the files that end in .bin."""
    hub = HubStandIn(files, elsewhere, token=token)
    listening = await asyncio.start_server(hub.serve, "127.0.0.1", 0)
    hub.port = listening.sockets[0].getsockname()[1]
    async with listening:
        try:
            yield hub
        finally:
            await close_server(listening, hub.writers)


def _sha1(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()
