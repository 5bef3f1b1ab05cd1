"""Models across nodes: who runs which layers, the engine that runs them, and a generation from end to end.

plan             which node runs which shard: a pure function
session          the driver of a generation; plans again when a stage is lost
attempt          one session on the nodes of one plan
text, chat       bytes to text that can be shown; messages to a prompt
stage            this node's engine processes
process, pipe    one engine process seen from the daemon; what the two say to each other
worker           the same from inside: sessions, frames in and out
stage_session    one session on one stage
admission        whether a stage can take a session
batching         sessions that wait for the engine, run together
channels, parts  frames between stages; what is asked of engine and transport
engine           llama.cpp over a run of shards; the only rooms that know of its library follow
shard, batch     one loaded shard; a batch for it
hidden_tap       the hidden state after a slice's last layer
sampling         a token from logits
vocabulary       tokens and text
memory           what a shard will take
hyperparameters  what a GGUF's header says of a model; what would end the process is refused
settings         of an engine; the constants that fix the shapes of batches
llama            the library's functions and structures, for one pinned version
engine_log       what the library says, into Python's logging
"""
