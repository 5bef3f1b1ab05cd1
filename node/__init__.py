"""The daemon, `shoal` or `python -m node`.

__main__    floor 6  `python -m node`
cli         floor 6  commands a person types
node        floor 5  composition root of the daemon
handlers    floor 4  one command -> one call
tasks       floor 4  what EXECUTE_TASK can run
http        floor 4  health and metrics
shards      floor 3  what a shard is here: state, verify, fetch, evict
pipeline    floor 3  plan, stage, session, engine
swarm       floor 2  libtorrent
discovery   floor 2  kademlia
transport   floor 2  tensor_iroh
origin      floor 2  object stores, web servers, the Hugging Face Hub, folders
formats     floor 2  GGUF and parquet, read as hostile input
rpc         floor 2  the MessagePack-RPC server
config      floor 1  settings, each declared once
background  floor 0  tasks that have an owner
clock       floor 0  the time that a package is given
machine     floor 0  memory and cores
files       floor 0  atomic replacement, fsync, locks
"""
