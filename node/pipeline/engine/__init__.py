"""llama.cpp over the shards of one model. Synchronous; nothing here knows of processes, sessions or networks.

engine           loaded shards, sequences with their KV caches, and the forward of a batch
shard            one shard's model and context in llama.cpp, and the decode of a batch
loaded_shard     what a loaded shard is: a record
batch            one sequence's part of a forward; the arrays of a `llama_batch`
hidden_tap       the hidden state after a slice's last layer, out of the eval callback
sampling         a token from logits
vocabulary       tokens to text and back
chat             messages to a prompt, by the model's chat template
memory           the memory that a shard takes, from the sizes in its header
settings         of an engine; the constants that fix the shapes of batches
llama            the C functions and structs of one pinned version of the library
log              the library's log, into Python's
"""
