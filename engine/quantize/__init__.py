"""Weight quantization: how floats are rounded; the layouts and the matmuls are the kernels'."""
