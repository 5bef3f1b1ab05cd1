"""Data shards on this machine's disk: fetched a few ahead, deleted when every reader is past them.

opening          one argument that says where shards come from
source           ShardSource, which a node, an origin and a folder are
node_source, origin_source, local_source
                 the three of them; named_origins, ranged_file: an origin's manifest, and its bytes
downloader       StreamingDownloader: the threads of one reader; status: what it says of itself
window, plan, buffer, measures, failures
                 what it decides by, without I/O
readers, locks   the ledger of the machine's readers: what may be deleted
disk, integrity  free and reserved space; whether a file is whole
names            the number in a shard's file name
"""
