"""What limits a run: fetching the files or training on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ConsumerTimes:
    """What a consumer measured, in seconds."""

    download_s: float = 0.0
    """With at least one file on its way."""
    train_s: float = 0.0
    """From a sample's handing over to the request for the next."""
    wait_s: float = 0.0
    """In which a sample was asked for and its file was not here."""
    decode_s: float = 0.0
    downloaded_bytes: int = 0
    samples: int = 0
    skipped: int = 0
    """Files that had vanished."""


@dataclass(frozen=True, slots=True)
class TimeReport:
    """All consumers of this machine together, seconds of each added up."""

    download_s: float
    train_s: float
    wait_s: float
    decode_s: float
    downloaded_bytes: int
    samples: int
    skipped: int
    limit: Literal["download", "training"]
    """The longer of the two, which run at the same time. Decoding counts as training."""
    advice: str


def time_report(spent: list[ConsumerTimes], epochs_per_subset: int) -> TimeReport:
    """Sum up, and advise. Pure."""
    download = sum(one.download_s for one in spent)
    train = sum(one.train_s for one in spent)
    decode = sum(one.decode_s for one in spent)
    busy = train + decode
    limit: Literal["download", "training"] = "download" if download > busy else "training"
    if limit == "training":
        advice = f"files come faster than they are used ({download:.1f} s against {busy:.1f} s): nothing to gain"
    else:
        ratio = download / busy if busy > 0 else math.inf
        often = f"epochs_per_subset={math.ceil(epochs_per_subset * ratio)}" if ratio < 100 else "more epochs_per_subset"
        advice = (
            f"fetching the files takes {download:.1f} s, using them {busy:.1f} s: {often} would use each batch often "
            "enough to hide that; else more concurrency, a nearer origin, or smaller files"
        )
    return TimeReport(
        download,
        train,
        sum(one.wait_s for one in spent),
        decode,
        sum(one.downloaded_bytes for one in spent),
        sum(one.samples for one in spent),
        sum(one.skipped for one in spent),
        limit,
        advice,
    )
