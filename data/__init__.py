"""What a run reads: sources, tokenizer, token shards, the order of data and batches. Imports no sibling package."""
