"""What runs a request: the local engine, ZeroGPU, and the admission of clients."""
