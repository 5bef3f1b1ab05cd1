"""Shares each fetch among all who ask for the shard, and bounds how many there are."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from node.clock import Clock
from node.shards.fetch.download import FetchNetwork, FetchStore, ShardFetch
from node.shards.fetch.job import FetchedShard, FetchJob, OnProgress
from node.shards.settings import ShardsSettings
from protocol.errors import CancelledRequestError, InsufficientDiskError, InternalError, ShoalError
from protocol.ids import ContentId, ManifestDigest
from protocol.manifest import Shard, ShardRef

log = logging.getLogger(__name__)


class Fetcher:
    """The fetches in progress: one job a shard, one at a time for a content, `max_downloads` downloads at a time."""

    def __init__(
        self,
        settings: ShardsSettings,
        store: FetchStore,
        network: FetchNetwork,
        tasks: asyncio.TaskGroup,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._store = store
        self._network = network
        self._tasks = tasks
        self._clock = clock
        self._slots = asyncio.Semaphore(settings.max_downloads)
        self._jobs: dict[ShardRef, FetchJob] = {}
        self._content_locks: dict[ContentId, tuple[asyncio.Lock, int]] = {}
        """Lock, and how many hold it or wait for it."""

    def jobs(self) -> list[FetchJob]:
        """In progress."""
        return list(self._jobs.values())

    def is_fetching(self, ref: ShardRef) -> bool:
        return ref in self._jobs

    async def fetch(self, shard: Shard, on_progress: OnProgress | None, *, for_lease: bool = False) -> FetchedShard:
        """Have the shard here and checked. Callers for one shard share one job, which ends if the last one leaves.

        `for_lease`: a file that comes has no pin.
        """
        job = self._jobs.get(shard.ref)
        if job is None:
            job = self._jobs[shard.ref] = FetchJob(shard, for_lease=for_lease)
            job.start(self._tasks, self._run(job))
        try:
            return await job.join(on_progress)
        finally:
            if job.is_abandoned:
                self._cancel(job)

    def cancel_all(self) -> None:
        """End all jobs; whoever waits for one gets CancelledRequestError."""
        for job in self.jobs():
            self._cancel(job)

    def _cancel(self, job: FetchJob) -> None:
        self._forget(job)  # at once: who asks while the job ends gets a new one
        job.cancel()

    def _forget(self, job: FetchJob) -> None:
        if self._jobs.get(job.shard.ref) is job:
            del self._jobs[job.shard.ref]

    async def _run(self, job: FetchJob) -> None:
        """Run the fetch, and give its result or error to the job."""
        name = job.shard.entry.filename
        try:
            job.finish(await self._fetch(job))
        except asyncio.CancelledError:
            job.fail(CancelledRequestError(f"the fetch of {name} was ended; what came is kept for the next"))
            raise
        except ShoalError as err:
            job.fail(err)
        except OSError as err:
            log.warning("fetching %s failed: %s", name, err)
            message = f"{name} could not be written: {err.strerror}"
            if err.errno in (errno.ENOSPC, errno.EDQUOT):
                job.fail(InsufficientDiskError(message + self._store.space.advice()))
            else:
                job.fail(InternalError(message))
        except Exception:
            log.exception("fetching %s failed", name)
            job.fail(InternalError(f"fetching {name} failed; the node's log says why"))
        finally:
            self._forget(job)

    async def _fetch(self, job: FetchJob) -> FetchedShard:
        fetch = ShardFetch(job, self._settings, self._store, self._network, self._slots, self._tasks, self._clock)
        await self._store.scanner.wait_scanned()
        async with self.alone_with(job.shard.entry.content_id):
            try:
                return await fetch.run()
            except BaseException:
                await self.remove_unused_folder(job.shard.digest, ending=job)
                raise

    @asynccontextmanager
    async def alone_with(self, content_id: ContentId) -> AsyncIterator[None]:
        """No other task fetches or evicts this content for the length of the block."""
        lock, users = self._content_locks.get(content_id, (asyncio.Lock(), 0))
        self._content_locks[content_id] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._content_locks.pop(content_id)
            if users > 1:
                self._content_locks[content_id] = (lock, users - 1)

    async def remove_unused_folder(self, digest: ManifestDigest, ending: FetchJob | None = None) -> None:
        """Remove the folder of a fetched manifest if it is empty and no job, but the one that ends, is to use it."""

        def is_used() -> bool:
            return any(job.shard.digest == digest and job is not ending for job in self.jobs())

        await self._store.folders.remove_unused(digest, is_used)
        self._store.scanner.poke()
