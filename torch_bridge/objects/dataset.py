"""O3Dataset: a map-style data set of objects at an origin."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch.utils.data import Dataset

from protocol.errors import InvalidParamsError
from torch_bridge.core.client import O3Client
from torch_bridge.core.folders import require_writable, writing_to
from torch_bridge.core.sizes import byte_count
from torch_bridge.objects.chunk_cache import ChunkCache
from torch_bridge.objects.formats import RecordFormat, SampleFormat, SampleIndex, WholeObjects
from torch_bridge.objects.listing import read_listing
from torch_bridge.objects.parquet import ParquetFormat
from torch_bridge.objects.range_reader import RangeReader, Stats

__all__ = ["O3Dataset", "ParquetFormat", "RecordFormat", "Stats", "WholeObjects"]


class O3Dataset(Dataset[Any]):
    """Objects under a prefix, as samples. Only the chunks that are needed are fetched, and kept in a cache on disk that
    all workers, ranks and runs of the machine share.

    data = O3Dataset("my-bucket", "train", O3Client(), "/data/cache", format=RecordFormat(65536), cache_limit="10gb")
    for batch in DataLoader(data, batch_size=32, num_workers=4, shuffle=True): ...

    A sample is an object's bytes (WholeObjects), a record's (RecordFormat) or a row as a dict (ParquetFormat);
    `decode`, a function of a module, turns it into what the model takes. Forked and spawned workers
    read through connections of their own. Raises OriginNotFoundError if nothing is under the prefix, InvalidParamsError
    for a `cache_dir` that cannot be written.
    """

    def __init__(
        self,
        bucket_name: str,
        prefix: str,
        client: O3Client,
        cache_dir: str | Path,
        concurrency: int = 4,
        *,
        cache_limit: str | int = "10gb",
        chunk_bytes: int = 1 << 20,
        request_bytes: int = 8 << 20,
        format: SampleFormat | None = None,  # noqa: A002 - the word that users look for
        decode: Callable[[Any], Any] | None = None,
        match: str | None = None,
        listing_ttl_s: float = 3600.0,
        read_ahead: str | int = "16MiB",
    ) -> None:
        """`bucket_name` may be the URL of any origin (file:///data). Each read has up to `concurrency` requests under
        way, of adjacent chunks up to `request_bytes`. `match` (fnmatch) chooses keys. The listing is read from
        metadata.json while it is younger than `listing_ttl_s`; after that, the etag of each object is compared when
        bytes of it come. If samples are read one after the other, up to `read_ahead` of an object is fetched in the
        background; nothing with 0, or a cache of less than four times `read_ahead`.
        """
        limit_bytes, ahead_bytes = byte_count(cache_limit), byte_count(read_ahead)
        if concurrency < 1 or chunk_bytes < 4096 or min(limit_bytes, ahead_bytes) < 0:
            raise InvalidParamsError(
                f"concurrency={concurrency}, chunk_bytes={chunk_bytes}, cache_limit={cache_limit}, "
                f"read_ahead={read_ahead}: concurrency must be 1 or more, chunk_bytes 4096 or more, the rest 0 or more"
            )
        url = f"{bucket_name.rstrip('/')}/{quote(prefix.strip('/'))}" if "://" in bucket_name else ""
        store = client.at(url) if url else client.bucket(bucket_name, prefix)
        folder = Path(cache_dir).absolute()
        listed = folder / hashlib.sha256(store.url.encode()).hexdigest()[:16]
        for needed in (folder, listed, folder / "chunks"):
            require_writable(needed, "cache_dir")
        with writing_to(folder, "cache_dir"):
            listing = read_listing(store, listed, listing_ttl_s)
        form = format or WholeObjects()
        objects = listing.matching(match or form.pattern)
        self.keys = tuple(one.key for one in objects)
        """The objects, in order."""
        cache = ChunkCache(folder / "chunks", limit_bytes)
        cache.sweep()
        self._reader = RangeReader(
            store,
            cache,
            chunk_bytes=chunk_bytes,
            request_bytes=request_bytes,
            concurrency=concurrency,
            trusted_until_s=listing.listed_at_s + listing_ttl_s,
            read_ahead_bytes=ahead_bytes,
        )
        self._samples = form.open(objects, self._reader)
        self._ends = list(accumulate(self._samples.counts))
        self._decode = decode

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        """One sample. Raises IndexError, or the OriginError tree."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Samples in the order asked for; missing chunks of all of them are fetched together. A DataLoader calls it."""
        return self._samples.read(self._reader, [self._sample_index(index) for index in indices], self._decode)

    def stats(self) -> Stats:
        """What this process read; workers count for themselves."""
        return self._reader.stats()

    def _sample_index(self, index: int) -> SampleIndex:
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"sample {index} was asked for, and the data set has {len(self)}")
        item = bisect_right(self._ends, at)
        return SampleIndex(item, at - (self._ends[item - 1] if item else 0))
