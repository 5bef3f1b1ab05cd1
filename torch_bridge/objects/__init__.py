"""O3Dataset: objects read by exact ranges, on demand, through a cache on disk."""
