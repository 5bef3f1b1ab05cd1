"""Other libraries' readers for scripts.bench.dataset, each in the format that its own documentation recommends.

None is a dependency of Shoal: what can be imported is measured. Each takes what it needs from the environment that
`environment` gives, and is imported only in the process that measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from scripts.bench.dataset.ours import SAMPLE_BYTES, Batches, Job, in_torch, tensor_of

REGION = "us-east-1"
CHUNK_BYTES = 16 << 20


def environment(job: Job) -> dict[str, str]:
    """Where boto3, s3torchconnector, mosaicml-streaming and litdata look for the server; reports to nobody."""
    return {
        "AWS_ACCESS_KEY_ID": job.access_key,
        "AWS_SECRET_ACCESS_KEY": job.secret_key,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ENDPOINT_URL": job.endpoint,
        "S3_ENDPOINT_URL": job.endpoint,
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "DATA_OPTIMIZER_NUM_WORKERS": "1",
        "OMP_NUM_THREADS": "1",
    }


def _share(items: list[Any]) -> list[Any]:
    info = get_worker_info()
    return items[info.id :: info.num_workers] if info else items


class _Sequential(IterableDataset[torch.Tensor]):
    """Samples of files that are read from front to back, one file after the other; workers share the files."""

    def __init__(self, files: Callable[[], list[Any]], read: Callable[[Any], Any]) -> None:
        self._files, self._read = files, read

    def __iter__(self) -> Iterator[torch.Tensor]:
        for one in _share(self._files()):
            with self._read(one) as file:
                while sample := file.read(SAMPLE_BYTES):
                    yield tensor_of(sample)


def s3torchconnector(job: Job) -> Batches:
    from s3torchconnector import S3ClientConfig, S3MapDataset

    data = S3MapDataset.from_prefix(
        f"s3://{job.bucket}/raw/",
        region=REGION,
        endpoint=job.endpoint,
        s3client_config=S3ClientConfig(force_path_style=True),
    )
    keys = [number for number in range(len(data)) if data._dataset_bucket_key_pairs[number].key.endswith(".bin")]
    loader = in_torch(_Sequential(lambda: keys, data.__getitem__), job, job.batch_size)
    return lambda _epoch: iter(loader)


def s3fs(job: Job) -> Batches:
    import fsspec

    def system() -> Any:
        return fsspec.filesystem(
            "s3", key=job.access_key, secret=job.secret_key, client_kwargs={"endpoint_url": job.endpoint}
        )

    def keys() -> list[Any]:
        return sorted(system().glob(f"{job.bucket}/raw/*.bin"))

    loader = in_torch(_Sequential(keys, lambda key: system().open(key, "rb")), job, job.batch_size)
    return lambda _epoch: iter(loader)


def mosaicml(job: Job) -> Batches:
    from streaming import StreamingDataset

    class Samples(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> torch.Tensor:
            return tensor_of(super().__getitem__(at)["x"])

    data = Samples(remote=f"s3://{job.bucket}/mds", local=job.cache, batch_size=job.batch_size, shuffle=False)
    loader = in_torch(data, job, job.batch_size)
    return lambda _epoch: iter(loader)


def litdata(job: Job) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    # Its obstore refuses an endpoint without TLS, and storage_options cannot tell it otherwise.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    data = StreamingDataset(
        f"s3://{job.bucket}/litdata",
        cache_dir=job.cache,
        shuffle=False,
        max_cache_size="10GB",
        transform=tensor_of,
        storage_options={
            "endpoint_url": job.endpoint,
            "aws_access_key_id": job.access_key,
            "aws_secret_access_key": job.secret_key,
            "region_name": REGION,
        },
    )
    loader = StreamingDataLoader(
        data, batch_size=job.batch_size, num_workers=job.workers, persistent_workers=job.workers > 0
    )
    return lambda _epoch: iter(loader)


def _samples(raw: str) -> list[tuple[str, int]]:
    return [
        (str(path), start)
        for path in sorted(Path(raw).glob("*.bin"))
        for start in range(0, path.stat().st_size, SAMPLE_BYTES)
    ]


def _sample(place: tuple[str, int]) -> bytes:
    with Path(place[0]).open("rb") as file:
        file.seek(place[1])
        return file.read(SAMPLE_BYTES)


def write_mds(job: Job, out: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"x": "bytes"}, size_limit=CHUNK_BYTES) as writer:
        for place in _samples(job.raw):
            writer.write({"x": _sample(place)})


def write_litdata(job: Job, out: Path) -> None:
    from litdata import optimize

    optimize(
        fn=_sample, inputs=_samples(job.raw), output_dir=str(out), chunk_bytes=CHUNK_BYTES, num_workers=1, verbose=False
    )


PEERS: dict[str, tuple[tuple[str, ...], Callable[[Job], Batches]]] = {
    "s3torchconnector": (("s3torchconnector",), s3torchconnector),
    "s3fs": (("fsspec", "s3fs"), s3fs),
    "mosaicml-streaming": (("streaming",), mosaicml),
    "litdata": (("litdata",), litdata),
}
"""By name, which is that of the package too: the modules to import, and what opens it."""
WRITERS: dict[str, tuple[str, Callable[[Job, Path], None]]] = {
    "mosaicml-streaming": ("mds", write_mds),
    "litdata": ("litdata", write_litdata),
}
"""Those that want their own format: its prefix at the origin, and what writes it to a folder."""
CACHELESS = ("s3torchconnector", "s3fs")
"""They keep nothing on disk: their warm reading is another cold one."""
