"""O3Dataset: objects read by exact ranges, on demand, through a cache on disk that a machine's processes share.

dataset       O3Dataset itself
listing       the objects under the prefix, kept in metadata.json
formats       what a sample is: a whole object, a record of fixed size
parquet       a sample is a row of a parquet file
range_reader  ranges through the cache: what is missing is fetched once
ranges        pure: which chunks a range needs, which come in one request, which are asked for ahead
chunk_cache   chunks on disk under a hard limit, and which of them go
chunk_file    one chunk on disk
"""
