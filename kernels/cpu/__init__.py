"""Paths that beat plain PyTorch on a CPU."""
