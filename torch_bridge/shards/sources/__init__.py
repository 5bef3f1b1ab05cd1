"""Where data shards come from. Each of these is a ShardSource.

interface        ShardSource and FetchedFile
factory          open_source: one argument that says where shards come from
node             NodeSource: through this machine's node, from peers first
origin           OriginSource: straight from an origin
local            LocalSource: shards that are in a folder already
subset           ShardSubset: some shards of another source
dataset_origins  the manifest of a data set, and the origins that its shards are read from
range_download   a shard's bytes from one store into a file, by ranges
"""
