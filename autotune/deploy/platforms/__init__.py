"""Files for platforms that run a serving engine: containers, clusters, clouds, one machine."""
