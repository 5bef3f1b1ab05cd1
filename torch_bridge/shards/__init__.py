"""Data shards on this machine's disk: fetched a few ahead, deleted when every reader is past them.

downloader  StreamingDownloader: the threads of one reader
window      no I/O: one reader's shards, which comes next, when a failed one is tried again
status      what the downloader measures and reports; the size of its buffer
readers     the machine's ledger of readers: which shards may be deleted
disk_limit  one limit in bytes for all readers of a folder: who may fetch what, and what goes
disk_space  free and reserved disk space
shard_file  whether a file can be the parquet file that it is named as; the number in its name
sources     where shards come from: a node, an origin, a folder
"""
