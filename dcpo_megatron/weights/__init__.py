"""Weights between Hugging Face names and Megatron shards."""
