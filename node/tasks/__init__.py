"""What EXECUTE_TASK can run.

registry   task types, the built-in ones and those of installed packages (entry points of the group `shoal.tasks`)
inference  `ai_inference`: generate text through a pipeline
placement  where a model's shards are and who can load the rest; has them loaded there
verify     `verify_shard`: hash a shard on disk again
"""
