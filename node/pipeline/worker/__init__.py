"""The inside of an engine process: takes the daemon's requests, runs sessions.

main        composition root of the process
worker      answers requests; owns the loaded shards and the sessions
session     one session on one stage: activations in, activations or tokens out
scheduler   runs engine calls one at a time; decodes the steps of sessions in batches
channels    frames between stages: over the transport, or in memory within a process
interfaces  what sessions ask of the engine and of the transport
"""
