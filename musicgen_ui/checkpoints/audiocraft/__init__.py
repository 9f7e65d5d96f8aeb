"""audiocraft's checkpoints, converted to transformers' format."""
