"""Checkpoints named by their content, at an origin and in the swarm.

o3_checkpoints  O3CheckpointManager: saves and restores
upload          a state on its way to the origin: snapshot, parts, manifest, commit
restore         a checkpoint on its way back: which commit counts, and its parts
rollback        the states of a checkpoint go to all objects of a training, or to none
commit          the signed commit object of a checkpoint
parts           named tensors as safetensors files of bounded size
state           a nested state as tensors and JSON, without pickle; random generators
dcp             O3StorageWriter and O3StorageReader for torch.distributed.checkpoint
"""
