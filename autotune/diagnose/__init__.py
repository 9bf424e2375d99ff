"""Why it is slow: findings by metric, from a profile."""
