"""The URLs of origins, and the keys that there may be under them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

from protocol.errors import InvalidParamsError

FORMS = (
    "o3://BUCKET[/PREFIX], akave://BUCKET[/PREFIX], s3://BUCKET[/PREFIX], https://HOST[/PREFIX], "
    "hf://OWNER/NAME[@REVISION][/PREFIX], hf://datasets/OWNER/NAME[@REVISION][/PREFIX], file:///PATH"
)
MAX_KEY_BYTES = 1024
"""S3's limit; it counts the prefix too (docs.aws.amazon.com, object keys)."""
_BUCKET = re.compile(r"[a-z0-9A-Z][a-z0-9A-Z._-]{1,254}")
_REPO_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
KEY_RULES = (
    "the steps of a key are separated by single slashes, none of them is . or .., and it has no backslash, no control "
    f"character, only valid Unicode, and at most {MAX_KEY_BYTES} bytes with its prefix; copy the object to such a key, "
    "or rename the file"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")
_REFUSED = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]")


@dataclass(frozen=True)
class OriginUrl:
    """One origin. `str()` gives its one spelling. URLs with credentials in them are refused."""

    scheme: Literal["o3", "akave", "s3", "https", "http", "hf", "file"]
    container: str
    """The bucket, HOST[:PORT] or OWNER/NAME; for file://, the absolute path of the folder."""
    prefix: str = ""
    """Comes before every key; without slashes at its ends, percent signs decoded."""
    repo_type: Literal["model", "dataset"] = "model"
    """hf:// only."""
    revision: str | None = None
    """hf:// only; None: the default branch."""

    @classmethod
    def parse(cls, text: str) -> OriginUrl:
        """Read a URL. Raises InvalidParamsError with the forms that are allowed, and without any secret of the URL."""
        try:
            parts = urlsplit(text.strip())
            _ = parts.port
        except ValueError:
            raise InvalidParamsError(f"an origin's URL is malformed; expected {FORMS}") from None
        if "@" in parts.netloc:
            raise InvalidParamsError(
                f"the {parts.scheme}:// URL of an origin holds a user name or a password; "
                "credentials come from the environment or files"
            )
        if parts.query or parts.fragment:
            raise InvalidParamsError(
                f"the URL of an origin at {parts.netloc} has a query or a fragment; a presigned URL cannot be an origin"
            )
        match parts.scheme:
            case "o3" | "akave" | "s3":
                return _bucket(parts.scheme, parts.netloc, parts.path)
            case "https" | "http":
                return _web(parts.scheme, parts.netloc, parts.path)
            case "hf":
                return _hub(parts.netloc, parts.path)
            case "file":
                return _file(parts.netloc, parts.path)
        raise InvalidParamsError(f"{text.strip()[:200]!r} is not the URL of an origin; expected {FORMS}")

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file://{quote(self.container)}"
        container = ("datasets/" if self.repo_type == "dataset" else "") + self.container
        container += f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{self.scheme}://{container}" + (f"/{quote(self.prefix)}" if self.prefix else "")

    def full_key(self, key: str) -> str:
        """The object's name in the container: prefix and key. Raises InvalidParamsError if the key is not allowed."""
        return checked_key(f"{self.prefix}/{key}" if self.prefix else key, key)


def checked_key(full: str, key: str | None = None) -> str:
    """The key itself. The one place that decides which keys can be read and written; `core.listing` lists no others.

    Raises InvalidParamsError if it has an empty, `.` or `..` step, a leading slash, a backslash, a control character or
    half of a surrogate pair (as the name of a file that is not UTF-8 has), or is too long.
    """
    shown = (full if key is None else key)[:200]
    if _REFUSED.search(full) or any(step in ("", ".", "..") for step in full.split("/")):
        raise InvalidParamsError(f"{shown!r} cannot be the key of an object: {KEY_RULES}")
    if len(full.encode()) > MAX_KEY_BYTES:
        raise InvalidParamsError(f"the key {shown!r} is longer than {MAX_KEY_BYTES} bytes with its prefix")
    return full


def is_loopback(host: str) -> bool:
    """Whether a host, without its port, is a loopback address or `localhost`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _prefix(path: str, url: str) -> str:
    prefix = unquote(path.strip("/"))
    if not prefix:
        return ""
    try:
        return checked_key(prefix)
    except InvalidParamsError as error:
        raise InvalidParamsError(f"the prefix of {url}: {error.message}") from None


def _bucket(scheme: Literal["o3", "akave", "s3"], netloc: str, path: str) -> OriginUrl:
    if not _BUCKET.fullmatch(netloc):
        raise InvalidParamsError(f"{netloc!r} in a {scheme}:// URL is not the name of a bucket; expected {FORMS}")
    return OriginUrl(scheme, netloc, _prefix(path, f"{scheme}://{netloc}"))


def _web(scheme: Literal["https", "http"], netloc: str, path: str) -> OriginUrl:
    host = urlsplit(f"//{netloc}").hostname or ""
    if not host or _CONTROL.search(netloc) or " " in netloc:
        raise InvalidParamsError(f"a {scheme}:// origin needs a host; expected {FORMS}")
    if scheme == "http" and not is_loopback(host):
        raise InvalidParamsError(
            f"http://{netloc} is not encrypted, and allowed for this machine only (127.0.0.1, ::1, localhost); "
            "use https://"
        )
    return OriginUrl(scheme, netloc.lower(), _prefix(path, f"{scheme}://{netloc}"))


def _hub(netloc: str, path: str) -> OriginUrl:
    words = [netloc, *path.strip("/").split("/")]
    repo_type: Literal["model", "dataset"] = "model"
    if words[0] in ("datasets", "models"):
        repo_type = "dataset" if words[0] == "datasets" else "model"
        words = words[1:]
    name, _, revision = (words[1] if len(words) > 1 else "").partition("@")
    if not (_REPO_WORD.fullmatch(words[0] if words else "") and _REPO_WORD.fullmatch(name)):
        raise InvalidParamsError(
            "a Hugging Face origin is hf://OWNER/NAME[@REVISION][/PREFIX] or hf://datasets/OWNER/NAME...; "
            f"found {f'hf://{netloc}{path}'[:200]!r}"
        )
    repository = f"{words[0]}/{name}"
    prefix = _prefix("/".join(words[2:]), f"hf://{repository}")
    return OriginUrl("hf", repository, prefix, repo_type, checked_key(unquote(revision)) if revision else None)


def _file(netloc: str, path: str) -> OriginUrl:
    if netloc not in ("", "localhost") or not path.startswith("/") or not path.strip("/"):
        raise InvalidParamsError(f"a file origin is file:///PATH with an absolute path; found file://{netloc}{path}")
    return OriginUrl("file", "/" + _prefix(path, f"file://{path}"))
