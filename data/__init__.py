"""What a model reads: sources, tokenizers, token shards and batches."""
