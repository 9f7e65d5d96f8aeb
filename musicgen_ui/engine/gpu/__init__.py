"""The decoder's step on NVIDIA GPUs: few fused kernels, captured as one CUDA graph."""
