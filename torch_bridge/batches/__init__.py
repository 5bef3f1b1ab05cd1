"""Large files in batches: fetched, used, deleted, while the next batch is on its way.

dataset    StreamingBatchDataset, an IterableDataset
settings   BatchSettings, and which consumer of how many a process is
session    one consumer's way through one epoch
plan       pure: the order of an epoch, whose file is whose, what makes a batch
fetching   the thread that brings files, within the bounds of the disk
folder     the cache folder: who has it, what is whole in it
progress   what survives a crash: a progress file, and a journal of what was consumed
sources    where files come from: an origin, the swarm; `hub`: Hugging Face; `archives`: inside tar and zip
ranged     files over ranges
metadata   captions and the like, loaded once
timing     download time against training time
"""
