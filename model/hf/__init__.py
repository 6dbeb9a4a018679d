"""Weights and configs of Hugging Face's own model classes, in plain torch."""
