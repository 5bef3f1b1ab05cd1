"""One command -> one call: what the RPC server's requests turn into.

table     every command with its handler
loading   have a shard here, checked, and loaded: what LOAD_SHARD does
shards    LOAD_SHARD, FETCH_SHARD, UNLOAD_SHARD, EVICT_SHARD, LIST_FILES, GET_MANIFEST
info      STATUS, NODES, CANCEL
sessions  TOKENIZE, OPEN_SESSION, START_SESSION, CLOSE_SESSION
"""
