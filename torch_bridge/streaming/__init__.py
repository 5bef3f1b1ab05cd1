"""Samples of shards, in one exact order for any number of workers and ranks.

dataset         StreamingShardDataset, an IterableDataset of batches
text_loader     TextLoader: token batches of a text column
settings        Ordering and Buffering
order           pure: the order of an epoch, and who reads which batch
disk_needs      pure: what the readers of one machine must have on the disk at once
position        where a reader stands in an epoch, saved and continued
epoch           the epoch, and who has read it, in memory that workers share
elastic_resume  pure: what another number of ranks has to read after a restart
shard_rows      the rows of all shards that one iteration reads
rows            the rows of one parquet file, each row group decoded once
schema          one schema for all shards; columns as numpy arrays
"""
