"""Large files in batches: fetched, used, deleted, while the next batch is on its way."""
