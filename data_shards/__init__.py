"""Pictures -> shards -> batches. Never imports trainer."""
