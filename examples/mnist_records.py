"""MNIST's files as records in a bucket: 784 bytes of pixels and one of the label, 10,000 records an object.

Any data set of MNIST's file format does: MNIST, Fashion-MNIST, KMNIST; the files may be gzipped. `make_digits` writes
one that is made here, for a machine without any.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protocol.errors import InvalidParamsError, OriginNotFoundError
from torch_bridge import O3Client

PIXELS = 28 * 28
RECORD_BYTES = PIXELS + 1
OBJECT_RECORDS = 10_000
INDEX = "index.json"
SPLITS = {"train": "train", "test": "t10k"}
"""Our name of a split, and how its files begin."""
MADE_RECORDS = {"train": 6_000, "test": 1_000}
"""Of each split, if `make_digits` makes them."""
_GLYPHS = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00010 00100 01000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)
"""The digits 0 to 9, each as 7 rows of 5 dots."""


def offer(client: O3Client, url: str, folder: Path | None, make: Callable[[], Path] | None = None) -> dict[str, Any]:
    """The index of the data under `url`: how many records each split has, and their SHA-256.

    Data that is not there yet is uploaded from `folder`, or else from the folder that `make` returns; the index goes
    last, so that half an upload is never taken for the whole. Raises InvalidParamsError if the data is neither there
    nor in the folder, or is not the same in both.
    """
    store = client.at(url)
    try:
        there = json.loads(store.get(INDEX))
    except OriginNotFoundError:
        there = None
    if folder is None:
        if there is not None:
            return dict(there)
        if make is None:
            raise InvalidParamsError(f"{url} has no {INDEX}: give --data DIR, the folder of MNIST's four files")
        folder = make()
    records = {split: read_split(folder, split) for split in SPLITS}
    index = {
        split: {
            "records": len(found),
            "record_bytes": RECORD_BYTES,
            "sha256": hashlib.sha256(found.tobytes()).hexdigest(),
        }
        for split, found in records.items()
    }
    if there is None:
        for split, found in records.items():
            for at in range(0, len(found), OBJECT_RECORDS):
                body = found[at : at + OBJECT_RECORDS].tobytes()
                store.put(f"{split}/{at // OBJECT_RECORDS:05d}.bin", body)
        store.put(INDEX, json.dumps(index, indent=2).encode())
    elif there != index:
        raise InvalidParamsError(f"{url} has other data than {folder}: leave --data out, or give another --url")
    return index


def read_split(folder: Path, split: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A split's records, [n, 785] bytes. Raises InvalidParamsError if a file is missing or of another format."""
    images = _idx(folder, f"{SPLITS[split]}-images-idx3-ubyte", 3)
    labels = _idx(folder, f"{SPLITS[split]}-labels-idx1-ubyte", 1)
    if images.shape != (len(labels), 28, 28):
        raise InvalidParamsError(
            f"{folder}: {images.shape} images and {len(labels)} labels; MNIST has 28 x 28, as many"
        )
    return np.concatenate([images.reshape(len(labels), PIXELS), labels[:, None]], axis=1)


def make_digits(folder: Path) -> Path:
    """Write MNIST's four files with digits that are drawn here, the same ones each time. Returns `folder`.

    A digit of 15 x 21 pixels, somewhere in 28 x 28, of some brightness, under noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    glyphs = np.array([[list(map(int, row)) for row in glyph.split()] for glyph in _GLYPHS]).repeat(3, 1).repeat(3, 2)
    for split, count in MADE_RECORDS.items():
        labels = draw.integers(0, 10, count)
        images = draw.integers(0, 64, (count, 28, 28))
        corners = draw.integers(0, (28 - 21 + 1, 28 - 15 + 1), (count, 2))
        brightness = draw.integers(96, 192, count)
        for image, label, (top, left), bright in zip(images, labels, corners, brightness, strict=True):
            image[top : top + 21, left : left + 15] += glyphs[label] * bright
        for kind, values in (("images", images), ("labels", labels)):
            shape = b"".join(size.to_bytes(4, "big") for size in values.shape)
            header = bytes((0, 0, 8, values.ndim)) + shape
            path = folder / f"{SPLITS[split]}-{kind}-idx{values.ndim}-ubyte"
            path.write_bytes(header + values.astype(np.uint8).tobytes())
    return folder


def batch_of(records: Sequence[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """Records as a model takes them: float32 [n, 1, 28, 28] from 0 to 1, and int64 labels [n]."""
    found = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8).view(len(records), RECORD_BYTES)
    return found[:, :PIXELS].reshape(-1, 1, 28, 28).float() / 255, found[:, PIXELS].long()


def _idx(folder: Path, name: str, axes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An idx file of bytes: two zeros, 8 for unsigned bytes, the number of axes, each axis as 4 bytes, the values."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if not plain.exists() and not zipped.exists():
        raise InvalidParamsError(
            f"{folder} has neither {name} nor {name}.gz: --data is the folder of MNIST's four files"
        )
    data = plain.read_bytes() if plain.exists() else gzip.decompress(zipped.read_bytes())
    start = 4 + 4 * axes
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    if data[:4] != bytes((0, 0, 8, axes)) or len(data) != start + math.prod(shape):
        raise InvalidParamsError(f"{folder / name} is not an idx file of bytes with {axes} axes, or was cut short")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
