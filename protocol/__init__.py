"""What crosses the wire between Shoal's nodes. It imports neither node nor torch_bridge.

ids          content id, info hash, manifest digest, node id: a type each
content      the Merkle root of a file, and the piece length that follows from its size
signing      ed25519 keys and signatures
manifest     the signed list of a model's or data set's shards
records      signed, expiring records of the DHT
commands/    the parameters and results of every command
errors       one tree of errors, each with its wire code
sockets      the one socket option that both ends need
structs      prepares the types that msgspec decodes into, for threads
msgpackrpc   MessagePack-RPC without I/O: bytes to messages and back
client       the asyncio client
sync_client  the same for code without an event loop
"""
