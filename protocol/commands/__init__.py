"""Every command: its parameters and its result, declared once and decoded by one function.

A command is the method of a MessagePack-RPC request; `params[0]` is the map of one of the `...Params`,
`params[1]`, optional, is an `Envelope`. Unknown keys are refused, so that a misspelt option is never ignored.

common      envelope, bases, shard selector, `decode_params`
shards      LOAD_SHARD, FETCH_SHARD, UNLOAD_SHARD, EVICT_SHARD, UNPIN, LIST_FILES, GET_MANIFEST
leases      RENEW, RELEASE
publishing  PUBLISH
nodes       STATUS, NODES, CANCEL
tasks       EXECUTE_TASK
sessions    TOKENIZE, OPEN_SESSION, START_SESSION, CLOSE_SESSION, between nodes
"""
