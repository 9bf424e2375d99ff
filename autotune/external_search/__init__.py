"""Searching the flags of a serving engine that is not ours, by measurement over HTTP."""
