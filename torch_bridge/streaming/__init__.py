"""Samples of shards, in one exact order for any number of workers and ranks.

dataset      StreamingShardDataset, an IterableDataset of batches
settings     Ordering and Buffering, what it is told
order        pure: the order of an epoch, and who reads which batch; `position`: where a reader stands in it
reading      the rows of shards that one iteration reads; `rows`: of one parquet file
chosen       some shards of a source, as a source
text_loader  TextLoader: token batches of a text column
"""
