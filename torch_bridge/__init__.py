"""What a training script imports.

o3_client    O3Client: session, credentials and retries; `stores`: one place at an origin; `loop`: the thread they run on
objects      O3Dataset: a map-style data set of objects read by ranges, with a cache on disk
shards       where data shards come from (node or origin), StreamingDownloader, and when a shard may be deleted
streaming    StreamingShardDataset: an exact order over shards, resumable; a tokenising loader
batches      StreamingBatchDataset: large files in batches, fetched, used, deleted
checkpoints  O3CheckpointManager, and storage for torch.distributed.checkpoint
"""
