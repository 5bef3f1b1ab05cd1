"""torch.distributed.checkpoint on an origin of Shoal's: O3StorageWriter and O3StorageReader.

store = O3Client().bucket("my-bucket")
dcp.save(state, storage_writer=O3StorageWriter(store, "run-7"))
dcp.load(state, storage_reader=O3StorageReader(store, "run-7"))       # the newest valid one

Inside dcp.save and dcp.load each error of these two comes out as torch's CheckpointException, which quotes it.

writer  O3StorageWriter: each rank puts its items, the coordinator commits
reader  O3StorageReader: the newest valid index; each object once, checked
index   torch's Metadata as one JSON object, and back; names
items   a tensor or a plain value as bytes, and back
"""

from torch_bridge.checkpoints.dcp.reader import NoCheckpointError, O3StorageReader
from torch_bridge.checkpoints.dcp.writer import O3StorageWriter

__all__ = ["NoCheckpointError", "O3StorageReader", "O3StorageWriter"]
