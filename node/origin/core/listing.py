"""What of a listing is given: the objects that can be read, in the order of keys, and one warning about the others."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from node.origin.interface import ObjectInfo
from node.origin.url import KEY_RULES, OriginUrl
from protocol.errors import InvalidParamsError

NAMED = 5
"""So many of the objects that are left out are named in the warning."""
_SHOWN_CHARACTERS = 200
_log = logging.getLogger(__name__)


def readable_objects(found: Iterable[ObjectInfo], url: OriginUrl, prefix: str) -> list[ObjectInfo]:
    """The objects that a store found under `prefix`, but for those whose key `url.full_key` refuses.

    A warning names these. Folder markers, objects without bytes whose key ends in a slash, hold nothing: they are left
    out without one. The keys are relative to `url`; that of a marker of its own prefix is empty.
    """
    readable: list[ObjectInfo] = []
    refused: list[str] = []
    for info in found:
        try:
            url.full_key(info.key)
        except InvalidParamsError:
            if info.size or not (info.key == "" or info.key.endswith("/")):
                refused.append(info.key)
        else:
            readable.append(info)
    if refused:
        warn_of_left_out(
            str(url), prefix, sorted(refused), len(refused) + len(readable), f"cannot be read: {KEY_RULES}"
        )
    return sorted(readable, key=lambda info: info.key.encode())


def warn_of_left_out(origin: str, prefix: str, keys: Sequence[str], total: int, why: str) -> None:
    """Write one warning that a listing leaves out `keys`, which are some of `total` objects; `why` is said of them."""
    named = ", ".join(repr(key[:_SHOWN_CHARACTERS]) for key in keys[:NAMED])
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    below = f" under {prefix[:_SHOWN_CHARACTERS]!r}" if prefix else ""
    _log.warning(
        "%s: the listing leaves out %d of %d objects%s: %s%s %s", origin, len(keys), total, below, named, more, why
    )
