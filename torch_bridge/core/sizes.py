"""Numbers of bytes as people write them: 10000000, "10gb" or "10GiB"."""

from __future__ import annotations

import re

from protocol.errors import InvalidParamsError

_UNITS = {"": 1, "b": 1} | {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


def byte_count(text: int | str) -> int:
    """Bytes that "10gb" (10^10) or "10GiB" (10 * 2^30) means. Raises InvalidParamsError for other text."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", text.lower()) if isinstance(text, str) else None
    if found is None or found[2] not in _UNITS:
        raise InvalidParamsError(
            f'{text!r} is not a number of bytes: give 10000000, "10gb" (powers of 1000) or "10GiB" (powers of 1024)'
        )
    return int(float(found[1]) * _UNITS[found[2]])
