"""Models across nodes: a node plans a generation, others run the layers of their shards, activations go between them.

driver    who runs which shards, and a generation from prompt to last token: the side of the node that was asked
stage     this node's engine processes: started, sent requests, watched
worker    the inside of an engine process: sessions, their batches and their channels
engine    llama.cpp over the shards of a stage; the only package that knows the library

`worker` and `stage` share the messages of `stage.ipc`; `worker` calls `engine`; `driver` reaches stages by RPC alone.
"""
