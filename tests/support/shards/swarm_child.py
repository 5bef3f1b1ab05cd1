"""A downloader in a process of its own, for tests that kill it or limit it.

Arguments: folder, port of the seed, size, content id, limit in bytes/s, limit of file size or 0 (set once it runs).
Prints the bytes that are done, a line each time, and last `verified` or an error's code.
"""

import asyncio
import resource
import sys
from pathlib import Path

from node.swarm import PeerAddress, Swarm, SwarmSettings, Torrent
from protocol.errors import ShoalError
from protocol.ids import ContentId


async def main(folder: Path, port: int, size: int, content_id: ContentId, limit: int, file_limit: int) -> None:
    torrent = Torrent.of("shard.bin", size, content_id)
    async with Swarm.open(SwarmSettings(folder / "state", download_limit_bytes_s=limit)) as swarm:
        download = await swarm.download(torrent, folder / "got.bin")
        download.add_peers([PeerAddress("127.0.0.1", port)])
        while not download.done:
            done = download.progress().bytes_done
            print(done, flush=True)
            if done and file_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
            await asyncio.sleep(0.05)
        try:
            await download.verified()
            print("verified", flush=True)
        except ShoalError as err:
            print(err.code, flush=True)


if __name__ == "__main__":
    where, port, size, content_id, limit, file_limit = sys.argv[1:]
    asyncio.run(main(Path(where), int(port), int(size), ContentId(content_id), int(limit), int(file_limit)))
