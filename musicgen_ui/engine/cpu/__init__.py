"""int8 inference on the CPU: kernels compiled by numba for the processor at hand."""
