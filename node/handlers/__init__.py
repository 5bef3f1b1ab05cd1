"""One command -> one call: what the RPC server's requests turn into.

table       every command with its handler
shards      LOAD_SHARD, FETCH_SHARD, UNLOAD_SHARD, EVICT_SHARD, LIST_FILES, GET_MANIFEST
leases      RENEW, RELEASE
publishing  PUBLISH, and which paths it may name
info        STATUS, NODES, CANCEL
sessions    TOKENIZE, OPEN_SESSION, START_SESSION, CLOSE_SESSION
"""
