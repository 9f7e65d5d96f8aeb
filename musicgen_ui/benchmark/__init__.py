"""Speed and memory, measured beside transformers."""
