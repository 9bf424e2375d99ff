"""Command line: one file a command; parses, shows progress, sets exit codes."""
