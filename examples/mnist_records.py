"""MNIST's files as records in a bucket: 784 bytes of pixels and one of the label, 10,000 records an object.

Any data set of MNIST's file format does: MNIST, Fashion-MNIST, KMNIST; the files may be gzipped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections.abc import Sequence
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


def offer(client: O3Client, url: str, folder: Path | None) -> dict[str, Any]:
    """The index of the data under `url`: how many records each split has, and their SHA-256.

    What is not there yet is uploaded from `folder`; the index goes last, so that half an upload is never taken for the
    whole. Raises InvalidParamsError where the data are neither there nor in `folder`, or not the same.
    """
    store = client.at(url)
    try:
        there = json.loads(store.get(INDEX))
    except OriginNotFoundError:
        there = None
    if folder is None:
        if there is None:
            raise InvalidParamsError(f"{url} has no {INDEX}: give --data DIR, the folder of MNIST's four files")
        return dict(there)
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
    """A split's records, [n, 785] bytes. Raises InvalidParamsError where files are missing or of another format."""
    images = _idx(folder, f"{SPLITS[split]}-images-idx3-ubyte", 3)
    labels = _idx(folder, f"{SPLITS[split]}-labels-idx1-ubyte", 1)
    if images.shape != (len(labels), 28, 28):
        raise InvalidParamsError(
            f"{folder}: {images.shape} images and {len(labels)} labels; MNIST has 28 x 28, as many"
        )
    return np.concatenate([images.reshape(len(labels), PIXELS), labels[:, None]], axis=1)


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
        raise InvalidParamsError(f"{folder / name} is no idx file of bytes with {axes} axes, or was cut short")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
