"""The daemon, `python -m node`.

cli/          floor 6  commands a person types
node.py       floor 5  composition root of the daemon
stage_process floor 5  composition root of an engine process
handlers/     floor 4  one command -> one call
tasks/        floor 4  what EXECUTE_TASK can run
http/         floor 4  health and metrics
shards/       floor 3  what a shard is here: state, verify, fetch, evict
pipeline/     floor 3  plan, stage, session, engine
swarm/        floor 2  libtorrent
discovery/    floor 2  kademlia
transport/    floor 2  tensor_iroh
formats/      floor 2  GGUF and parquet, read as hostile input
rpc/          floor 2  the MessagePack-RPC server
config.py     floor 1  settings
"""
