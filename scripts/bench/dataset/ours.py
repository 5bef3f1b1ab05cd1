"""The data that scripts.bench.dataset reads, at an origin in the layouts of each reader of ours, and those readers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from node.origin.publishing import SourceFile, missing_at, publish
from protocol.content import hash_file
from protocol.ids import ContentId, ShardId
from protocol.manifest import Manifest, ShardEntry, sign_manifest
from protocol.signing import SigningKey
from torch_bridge import O3Client
from torch_bridge.core.loop_thread import loop_thread

SAMPLE_BYTES = 64 << 10
NAME = "bench/samples"
Batches = Callable[[int], Iterator[torch.Tensor]]
"""The batches of an epoch: uint8 tensors [batch, SAMPLE_BYTES]."""


@dataclass(frozen=True)
class Job:
    """One measurement: what a process of its own is told."""

    contender: str
    bucket: str
    endpoint: str
    access_key: str
    secret_key: str
    cache: str
    """A folder for the contender's cache: empty when cold, that of the cold reading when warm."""
    raw: str
    """The folder of the local files."""
    shards: int
    batch_size: int
    workers: int
    epochs: int
    peers_path: str


def client_of(job: Job) -> O3Client:
    return O3Client(endpoint=job.endpoint, access_key=job.access_key, secret_key=job.secret_key, backend="gateway")


def tensor_of(sample: bytes) -> torch.Tensor:
    """What each reader makes of a sample."""
    return torch.from_numpy(np.frombuffer(sample, np.uint8).copy())


def write_local(folder: Path, shards: int, samples: int) -> list[Path]:
    """`shards` files of `samples` random samples in all."""
    folder.mkdir(parents=True)
    paths = []
    for shard in range(shards):
        paths.append(folder / f"shard_{shard:05d}.bin")
        paths[-1].write_bytes(os.urandom(samples // shards * SAMPLE_BYTES))
    return paths


def upload(job: Job, prefix: str, paths: Sequence[Path], root: Path) -> None:
    """Each file under its path below `root`."""
    with client_of(job) as client:
        store = client.bucket(job.bucket, prefix)
        for path in paths:
            store.put(path.relative_to(root).as_posix(), path.read_bytes())


def publish_parquet(job: Job, paths: Sequence[Path], folder: Path) -> None:
    """The same samples as parquet shards with a signed manifest, as `publish` lays them out."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir()
    entries, files, torrents = [], {}, {}
    for number, path in enumerate(paths):
        raw = path.read_bytes()
        rows = [raw[start : start + SAMPLE_BYTES] for start in range(0, len(raw), SAMPLE_BYTES)]
        out = folder / f"{path.stem}.parquet"
        table = pa.table({"x": pa.array(rows, pa.binary(SAMPLE_BYTES))})
        parquet.write_table(table, out, row_group_size=64, compression="none", use_dictionary=False)
        hashed = hash_file(out)
        content = ContentId(hashed.content_id)
        entries.append(
            ShardEntry(
                shard_id=ShardId(number),
                filename=out.name,
                size=hashed.size,
                content_id=hashed.content_id,
                kind="parquet",
                rows=len(rows),
            )
        )
        stat = out.stat()
        files[content] = SourceFile(out, stat.st_size, stat.st_mtime_ns)
        torrents[content] = b"d1:a" + hashed.piece_layer + b"e"
    manifest = Manifest(name=NAME, kind="dataset", shards=tuple(entries))
    signed = sign_manifest(manifest, SigningKey.generate(), ())
    with client_of(job) as client:
        backing = client.bucket(job.bucket).backing

        async def send() -> None:
            await publish(backing, signed, await missing_at(backing, manifest), files, torrents)

        loop_thread().run(send())


class LocalRecords(Dataset[torch.Tensor]):
    """Fixed-size records of local files, by plain `os.pread`."""

    def __init__(self, folder: str) -> None:
        self._paths = sorted(Path(folder).glob("*.bin"))
        self._each = self._paths[0].stat().st_size // SAMPLE_BYTES
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return self._each * len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        shard, row = divmod(index, self._each)
        if shard not in self._open:
            self._open[shard] = os.open(self._paths[shard], os.O_RDONLY)
        return tensor_of(os.pread(self._open[shard], SAMPLE_BYTES, row * SAMPLE_BYTES))


class LocalParquet(IterableDataset[torch.Tensor]):
    """Batches of local parquet files, one after the other, as pyarrow gives them; workers share the files."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        self._paths, self._batch_size = sorted(folder.glob("*.parquet")), batch_size

    def __iter__(self) -> Iterator[torch.Tensor]:
        import pyarrow as pa
        from pyarrow import parquet

        from torch_bridge.streaming.schema import as_arrays

        info = get_worker_info()
        for path in self._paths[info.id :: info.num_workers] if info else self._paths:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(self._batch_size, use_threads=False):
                    yield _as_tensor(as_arrays(pa.Table.from_batches([batch])))


def in_torch(data: Any, job: Job, batch_size: int | None) -> DataLoader[Any]:
    return DataLoader(data, batch_size, num_workers=job.workers, persistent_workers=job.workers > 0)


def local(job: Job) -> Batches:
    loader = in_torch(LocalRecords(job.raw), job, job.batch_size)
    return lambda _epoch: iter(loader)


def local_parquet(job: Job) -> Batches:
    loader = in_torch(LocalParquet(Path(job.raw).with_name("parquet"), job.batch_size), job, None)
    return lambda _epoch: iter(loader)


def o3_dataset(job: Job) -> Batches:
    from torch_bridge.objects.dataset import O3Dataset, RecordFormat

    data = O3Dataset(
        job.bucket,
        "raw",
        client_of(job),
        job.cache,
        format=RecordFormat(SAMPLE_BYTES),
        decode=tensor_of,
        match="*.bin",
    )
    loader = in_torch(data, job, job.batch_size)
    return lambda _epoch: iter(loader)


def _as_tensor(columns: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(columns["x"])


def streaming_shards(job: Job) -> Batches:
    from torch_bridge.shards.sources.origin import OriginSource
    from torch_bridge.streaming.dataset import StreamingShardDataset
    from torch_bridge.streaming.settings import Buffering, Ordering

    source = OriginSource(f"o3://{job.bucket}", Path(job.cache), dataset=NAME, client=client_of(job))
    # keep_behind: the files stay for the warm reading.
    data = StreamingShardDataset(
        source,
        batch_size=job.batch_size,
        transform=_as_tensor,
        ordering=Ordering(shuffle=False, lanes=max(1, job.workers)),
        buffering=Buffering(keep_behind=job.shards),
    )
    loader = in_torch(data, job, None)

    def batches(epoch: int) -> Iterator[torch.Tensor]:
        data.set_epoch(epoch)
        return iter(loader)

    return batches


OURS: dict[str, tuple[tuple[str, ...], Callable[[Job], Batches]]] = {
    "local files": ((), local),
    "local parquet": (("pyarrow.parquet", "torch_bridge.streaming.schema"), local_parquet),
    "O3Dataset": (("torch_bridge.objects.dataset", "node.origin.s3.store"), o3_dataset),
    "StreamingShardDataset": (
        ("torch_bridge.shards.sources.origin", "torch_bridge.streaming.dataset", "node.origin.s3.store"),
        streaming_shards,
    ),
}
"""By name: the modules to import, and what opens it."""
LOCAL = {"O3Dataset": "local files", "StreamingShardDataset": "local parquet"}
"""What each reader of ours is held against when it is warm: the same bytes as local files."""
