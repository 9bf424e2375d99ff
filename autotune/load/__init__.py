"""Sends a workload to an engine at its own times and records what became of each request."""

from autotune.load.open_loop import LoadProgress, LoadResult, run_load

__all__ = ["LoadProgress", "LoadResult", "run_load"]
