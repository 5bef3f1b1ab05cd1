"""Whether O3 can be reached with these credentials, and does what a training run needs: each step with its result.

    python scripts/check_o3.py                                       # keys from the environment, a bucket for the check
    python scripts/check_o3.py --bucket my-data                      # in this bucket, which is left as it was
    python scripts/check_o3.py --endpoint https://o3.example.org     # the gateway that your credential is of
    python scripts/check_o3.py --backend native                      # by the akavesdk, with AKAVE_PRIVATE_KEY
    python scripts/check_o3.py --json | jq .ok

Credentials: AKAVE_O3_ACCESS_KEY and AKAVE_O3_SECRET_KEY, natively AKAVE_PRIVATE_KEY; each may be in a file instead,
that the same variable with _FILE names. They are no arguments, and nothing here prints them.

What the check made it takes away again: its object always, its bucket if it was not there before, unless --keep-bucket
is given. Natively a bucket stays, and it says so. Exits with 0 where every step went well, with 1 where one did not,
and with 2 where it could not begin.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from node.origin.factory import goes_native  # noqa: E402
from node.origin.settings import O3_ENDPOINT, OriginSettings  # noqa: E402
from node.origin.url import OriginUrl  # noqa: E402
from protocol.errors import (  # noqa: E402
    InvalidParamsError,
    OriginDeniedError,
    OriginError,
    OriginExistsError,
    OriginNotFoundError,
    OriginUnavailableError,
    ShoalError,
)
from torch_bridge import O3Client, RetryPolicy  # noqa: E402
from torch_bridge.core.store import Store  # noqa: E402

OBJECT_BYTES = 300_000
RANGE = (12_345, 212_345)
CONNECT_S, READ_S = 5.0, 30.0


@dataclass(frozen=True)
class Step:
    """One line of the result."""

    name: str
    result: str
    """ok, failed, or skipped: what it needs has failed."""
    ms: float = 0.0
    found: str = ""
    hint: str = ""


class Check:
    """The steps, in order; each is printed as soon as it is known."""

    def __init__(self, client: O3Client, bucket: str | None, show: Callable[[Step], None]) -> None:
        self.steps: list[Step] = []
        self._client, self._show = client, show
        self._named = bucket is not None
        self.bucket = bucket or f"shoal-check-{secrets.token_hex(4)}"
        self._native = goes_native(OriginUrl.parse(f"{client.scheme}://{self.bucket}"), client.settings)
        self._made = False

    @property
    def ok(self) -> bool:
        """Whether no step failed or was skipped."""
        return all(step.result == "ok" for step in self.steps)

    def run(self, *, keep_bucket: bool) -> None:
        """All steps. What was made is taken away whatever fails, an interruption too."""
        listed = self._step("credentials", self._credentials)
        try:
            there = self._step("bucket create", self._create, after=listed)
            self._step("bucket list", self._list, after=there)
            # A key may be good for one bucket alone, and not for a list of all.
            self._objects(self._client.bucket(self.bucket, "shoal-check"), after=there or self._named)
        finally:
            if self._made and not keep_bucket:
                self._step("bucket delete", self._delete_bucket)

    def _objects(self, store: Store, *, after: bool) -> None:
        key, body = f"{secrets.token_hex(8)}.bin", os.urandom(OBJECT_BYTES)
        put = False
        try:
            put = self._step("put", lambda: _size(store.put(key, body, if_absent=True).size), after=after)
            self._step("ranged get", lambda: _ranged(store, key, body), after=put)
            self._step("head", lambda: _head(store, key), after=put)
        finally:
            if not self._step("delete", lambda: _deleted(store, key), after=put) and after:
                with suppress(ShoalError):  # it may have been written all the same
                    store.delete(key)

    def _step(self, name: str, do: Callable[[], str], *, after: bool = True) -> bool:
        if not after:
            return self._told(Step(name, "skipped", found="what it needs has failed"))
        started = time.monotonic()
        try:
            found = do()
        except ShoalError as error:
            return self._told(Step(name, "failed", _ms(started), error.message, hint(name, error)))
        return self._told(Step(name, "ok", _ms(started), found))

    def _told(self, step: Step) -> bool:
        self.steps.append(step)
        self._show(step)
        return step.result == "ok"

    def _credentials(self) -> str:
        keys = self._client.settings.credentials
        if not (self._native or keys.o3_access_key or keys.o3_secret_key):
            raise OriginDeniedError("AKAVE_O3_ACCESS_KEY and AKAVE_O3_SECRET_KEY are not set: there are no credentials")
        count = len(self._client.list_buckets())
        return f"accepted; {count} bucket{'' if count == 1 else 's'}"

    def _create(self) -> str:
        self._made = self._client.create_bucket(self.bucket)
        return f"{self.bucket} {'made' if self._made else 'was there before'}"

    def _list(self) -> str:
        if self.bucket not in (found := self._client.list_buckets()):
            raise OriginError(f"{self.bucket} is none of the {len(found)} buckets that are listed")
        return f"{self.bucket} is listed"

    def _delete_bucket(self) -> str:
        if self._native:
            return f"{self.bucket} is left: natively there is no way to it here"
        self._client.delete_bucket(self.bucket)
        return f"{self.bucket} deleted"


def _ms(started_s: float) -> float:
    return round((time.monotonic() - started_s) * 1e3, 1)


def _size(size: int) -> str:
    return f"{size:,} bytes"


def _ranged(store: Store, key: str, body: bytes) -> str:
    if store.get_range(key, *RANGE) != body[slice(*RANGE)]:
        raise OriginError(f"bytes {RANGE[0]} to {RANGE[1]} came, and are not those that were written")
    return f"bytes {RANGE[0]:,} to {RANGE[1]:,}, the same as written"


def _head(store: Store, key: str) -> str:
    info = store.head(key)
    if info.size != OBJECT_BYTES:
        raise OriginError(f"it says {info.size} bytes, and {OBJECT_BYTES} were written")
    state = f", on Akave's network: {info.network_state}" if info.network_state else ""
    return _size(info.size) + state


def _deleted(store: Store, key: str) -> str:
    store.delete(key)
    return "gone" if not store.list(key) else "asked for; it is still listed"


def hint(step: str, error: ShoalError) -> str:
    """What to look at, beyond what the error says."""
    text = error.message
    match error:
        case OriginDeniedError() if "SignatureDoesNotMatch" in text:
            return "the access key is known, its secret key is another one: was it cut or quoted when it was copied?"
        case OriginDeniedError() if "InvalidAccessKeyId" in text:
            return "this endpoint does not know the access key: a credential is of one gateway, and --endpoint names it"
        case OriginDeniedError() if step == "bucket create":
            return "the key may not make or list buckets: name one that it may use by --bucket"
        case OriginDeniedError() if "403" in text or "401" in text:
            return "the key is wrong, has expired, or may not do this: look at it where it was issued"
        case OriginDeniedError() | InvalidParamsError():
            return "set the variables, or put the secrets into files and name those by the same variables with _FILE"
        case OriginUnavailableError() if "refused" in text or "name is not known" in text:
            return (
                "nothing answers at this endpoint: is it spelt as your credential's page has it? a proxy, a firewall?"
            )
        case OriginUnavailableError():
            return "the gateway answers badly or not in time: try again in some minutes"
        case OriginExistsError() if step == "bucket create":
            return "somebody else has a bucket of that name: give another --bucket"
        case OriginNotFoundError():
            return "the bucket is not there: leave --bucket away, and the check makes one"
        case OriginError() if step == "bucket delete":
            return "it may not be empty: look into it, and delete it by hand"
        case OriginError() if "akavesdk" in text:
            return "docs/akave.md says how to install the akavesdk; --backend gateway needs none"
    return "look at the endpoint and its certificate; docs/akave.md has more"


def line(step: Step) -> str:
    """A step for a terminal."""
    ms = f"{step.ms:7.0f} ms" if step.result != "skipped" else " " * 10
    shown = f"{step.result.upper() if step.result == 'failed' else step.result:8}{step.name:15}{ms}   {step.found}"
    return shown + (f"\n{'':8}hint: {step.hint}" if step.hint else "")


def _arguments() -> argparse.Namespace:
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bucket", help="the bucket to check in; default: one with a name of its own")
    parser.add_argument("--keep-bucket", action="store_true", help="leave a bucket that this made")
    parser.add_argument("--endpoint", help=f"the gateway; default: SHOAL_O3_ENDPOINT, or {O3_ENDPOINT}")
    parser.add_argument("--backend", choices=("auto", "gateway", "native"), default="auto", help="default: auto")
    parser.add_argument(
        "--patience", type=float, default=10.0, metavar="S", help="seconds of retries a step; default 10"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    return parser.parse_args()


def main() -> int:
    """Check as the command line says."""
    wanted = _arguments()
    try:
        settings = replace(
            OriginSettings.from_environment(o3_endpoint=wanted.endpoint or None),
            connect_timeout_s=CONNECT_S,
            read_timeout_s=READ_S,
        )
        client = O3Client(backend=wanted.backend, settings=settings, retry=RetryPolicy(total_s=wanted.patience))
        native = goes_native(OriginUrl.parse(f"o3://{wanted.bucket or 'any'}"), client.settings)
    except ShoalError as error:
        print(error.message, file=sys.stderr)
        return 2
    where = settings.akave_node if native else client.settings.o3_endpoint
    check = Check(
        client, wanted.bucket, (lambda _: None) if wanted.json else lambda step: print(line(step), flush=True)
    )
    if not wanted.json:
        print(f"O3 {'natively' if native else 'by its gateway'} at {where}, bucket {check.bucket}")
    with client:
        check.run(keep_bucket=wanted.keep_bucket)
    if wanted.json:
        about = {"ok": check.ok, "endpoint": where, "native": native, "bucket": check.bucket}
        print(json.dumps(about | {"steps": [asdict(step) for step in check.steps]}, indent=2))
    else:
        count = {result: sum(step.result == result for step in check.steps) for result in ("failed", "skipped")}
        print("all is well" if check.ok else f"{count['failed']} failed, {count['skipped']} skipped")
    return 0 if check.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
