"""Types that msgspec decodes into, prepared once: two threads that first decode into one at once end the process.

msgspec (0.22) collects a type's fields when it first decodes into it, and another thread may see half of them. Every
decoding call of this project passes its type through `prepared`; scripts/tools/check_layout.py checks that.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

Kind = TypeVar("Kind")

_prepared: set[Any] = set()
_preparing = threading.Lock()


def prepared(kind: Kind) -> Kind:
    """The type itself, whose fields msgspec knows by now. Raises TypeError for one that it cannot decode into."""
    if kind not in _prepared:
        with _preparing:
            msgspec.msgpack.Decoder(kind)
            _prepared.add(kind)
    return kind
