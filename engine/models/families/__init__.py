"""One file for each family: how its config says what its decoder looks like."""
