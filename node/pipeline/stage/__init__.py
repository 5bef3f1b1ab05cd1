"""The stages of this node, as its daemon sees them: one engine process for each loaded model.

stages   loads shards and runs sessions; what happens when a process dies
process  one engine process: started, sent requests, watched, stopped
ipc      the messages between the daemon and an engine process, and the pipe that carries them
"""
