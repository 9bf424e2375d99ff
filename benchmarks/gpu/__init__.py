"""What the GPU kernels and the engine reach on the GPU at hand; `scripts/gpu_check.sh` runs it."""
