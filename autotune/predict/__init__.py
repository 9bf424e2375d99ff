"""What a configuration would measure: a fitted cost of a step, and the real scheduler on it."""
