"""Large files in batches: fetched, used, deleted, while the next batch is on its way.

dataset         StreamingBatchDataset, an IterableDataset
settings        BatchSettings, and which consumer of how many a process is
consumer_epoch  one consumer's way through one epoch
plan            pure: the order of an epoch, whose file is whose, what makes a batch
fetcher         the threads that bring files, within the bounds of the disk
folder          the cache folder: who has it, which files are whole in it
journal         what survives a crash: a progress file, and a journal of what was consumed
metadata        captions and the like, loaded once
stats           download time against training time
sources         where files come from: an origin, the swarm, Hugging Face, archives
"""
