"""Kernels in Triton for NVIDIA GPUs; ``runtime`` says where they run, ``backend`` lists them."""
