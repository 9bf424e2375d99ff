"""Capacity planning: how many of which GPU, at what price, for a traffic and a promise."""
