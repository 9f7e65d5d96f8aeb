"""Checkpoints: where they come from, what their configurations say, loading their weights."""
