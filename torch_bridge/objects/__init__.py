"""O3Dataset: objects read by exact ranges, on demand, through a cache on disk that a machine's processes share.

dataset      O3Dataset itself
listing      what lies under the prefix, kept in metadata.json
formats      what a sample is: a whole object, a record of fixed size; `parquet`: a row
reading      ranges through the cache: what is missing is fetched, once
chunk_cache  chunks on disk under a hard limit; `chunk_file`: one of them; `lru`: which go
ranges       which chunks a range needs, and which come in one request
"""
