"""The decoder step on NVIDIA GPUs: its buffers, and a few fused kernels."""
