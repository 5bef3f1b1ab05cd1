"""Samples of shards, in one exact order for any number of workers and ranks."""
