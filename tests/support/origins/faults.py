"""What a fault-injecting origin does wrong, to which requests, and what left it: plain values, no sockets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, NamedTuple

import msgspec

Kind = Literal["status", "expired", "hang", "stall", "truncate", "ignore_range", "wrong_bytes"]


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One rule. It holds for requests of `methods` for keys that contain `key`, until it was applied `times` times."""

    kind: Kind
    """status: an error answer. expired: S3's error body for a token (400) or, with `status` 403, a signature that has
    expired. hang: no answer. stall: silence after `after_bytes` of the body. truncate: the connection is closed there.
    ignore_range: 200 and the whole object. wrong_bytes: one byte of the object, at `offset`, is another."""
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] | None = None
    retry_after_s: Annotated[int, msgspec.Meta(ge=0)] | None = None
    after_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Of the answer's body."""
    offset: Annotated[int, msgspec.Meta(ge=0)] = 0
    """In the object."""
    times: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Requests; without it, until the rule is taken away."""
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Of the requests that it holds for, evenly: 0.5 is every second one, the first one among them."""
    key: str = ""
    methods: tuple[str, ...] = ("GET", "HEAD")


class Range(NamedTuple):
    """Bytes [start, end) of an object; `end` None where it was asked for up to its end."""

    start: int
    end: int | None

    @classmethod
    def asked(cls, header: str | None) -> Range | None:
        """What a Range header asks for. None where there is none, or one of a form that no client of ours uses."""
        unit, _, spec = (header or "").partition("=")
        first, dash, last = spec.partition("-")
        first, last = first.strip(), last.strip()
        if unit.strip() != "bytes" or not dash or not first.isdecimal() or not (last.isdecimal() or not last):
            return None
        return cls(int(first), int(last) + 1 if last else None)

    def covers(self, offset: int) -> bool:
        return self.start <= offset and (self.end is None or offset < self.end)


class Sent(msgspec.Struct, kw_only=True):
    """The payload of one answer that left, as far as it left."""

    key: str
    """bucket/name."""
    start: int
    """In the object."""
    size: int = 0
    """Bytes that left so far."""
    asked: tuple[int, int | None] | None
    """The range that the request asked for."""
    fault: str = ""
    """The kind of the rule that was applied to it."""


class Rules:
    """The rules in force; the first that fits a request is applied."""

    def __init__(self) -> None:
        self._rules: list[tuple[Fault, list[float]]] = []
        self.applied: dict[str, int] = {}
        """Kind -> requests that it was applied to."""

    def add(self, fault: Fault) -> None:
        self._rules.append((fault, [1.0, 0]))

    def clear(self) -> None:
        self._rules.clear()

    def listed(self) -> list[Fault]:
        return [fault for fault, _ in self._rules]

    def take(self, method: str, key: str, asked: Range | None) -> Fault | None:
        """The rule for this request, counted as applied."""
        for fault, state in self._rules:
            if method not in fault.methods or fault.key not in key:
                continue
            if fault.kind == "wrong_bytes" and asked and not asked.covers(fault.offset):
                continue
            if fault.kind == "ignore_range" and asked is None:
                continue
            if fault.times is not None and state[1] >= fault.times:
                continue
            credit, state[0] = state[0], state[0] + fault.share
            if credit < 1.0 - 1e-9:
                continue
            state[0] -= 1.0
            state[1] += 1
            self.applied[fault.kind] = self.applied.get(fault.kind, 0) + 1
            return fault
        return None


class Ledger:
    """What left the origin. Only payload counts: bodies of objects, not errors, listings or headers."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.requests = 0
        """All that came, whatever became of them."""

    def reset(self) -> None:
        self.sent, self.requests = [], 0

    def of(self, key: str = "") -> list[Sent]:
        """What left of the keys that contain `key`."""
        return [sent for sent in self.sent if key in sent.key and sent.size]

    def payload_bytes(self, key: str = "") -> int:
        return sum(sent.size for sent in self.of(key))

    def repeated(self, key: str = "") -> int:
        """Bytes that left more often than once, each counted as often as it left after the first time.

        Answers of the whole object to who asked for a range are left out, here and below: they cannot be used.
        """
        usable = self._usable(key)
        return sum(sent.size for sent in usable) - sum(
            union_bytes((sent.start, sent.start + sent.size) for sent in usable if sent.key == name)
            for name in {sent.key for sent in usable}
        )

    def pieces_sent_twice(self, key: str, piece_bytes: int) -> list[int]:
        """Pieces of an object, each of `piece_bytes`, all of whose bytes left twice or more."""
        twice: list[tuple[int, int]] = []
        reached = 0
        for start, end in sorted((sent.start, sent.start + sent.size) for sent in self._usable(key)):
            twice.append((start, min(end, reached)))
            reached = max(reached, end)
        last = max((end for _, end in twice), default=0)
        return [
            at // piece_bytes
            for at in range(0, last, piece_bytes)
            if union_bytes((max(start, at), min(end, at + piece_bytes)) for start, end in twice) == piece_bytes
        ]

    def _usable(self, key: str) -> list[Sent]:
        return [sent for sent in self.of(key) if sent.fault != "ignore_range"]


def union_bytes(ranges: Iterable[tuple[int, int]]) -> int:
    """How many bytes lie in at least one of the ranges [start, end)."""
    total, reached = 0, 0
    for start, end in sorted(ranges):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def error_body(code: str, message: str, key: str) -> bytes:
    """An S3 error answer's body."""
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>'
        f"<Resource>/{key}</Resource><RequestId>0</RequestId></Error>"
    ).encode()


ERRORS = {
    400: ("ExpiredToken", "The provided token has expired."),
    403: ("AccessDenied", "Access Denied"),
    404: ("NoSuchKey", "The specified key does not exist."),
    429: ("TooManyRequests", "Please reduce your request rate."),
    500: ("InternalError", "We encountered an internal error. Please try again."),
    503: ("SlowDown", "Please reduce your request rate."),
}
"""Status -> code and message, as S3 has them."""
EXPIRED_SIGNATURE = ("AccessDenied", "Request has expired")
