"""Publishing a run as a Hugging Face folder: `braid export`."""
