"""Data shards on this machine's disk: where they come from, fetched ahead, and when one may be deleted."""
