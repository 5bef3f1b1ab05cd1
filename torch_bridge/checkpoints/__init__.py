"""Checkpoints named by their content, at an origin and in the swarm."""
