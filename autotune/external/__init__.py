"""Serving engines that are not ours: their flags, their processes, and how they fail."""
