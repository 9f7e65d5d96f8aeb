"""The decoder's step on NVIDIA and AMD GPUs: few fused kernels, captured as one CUDA graph."""
