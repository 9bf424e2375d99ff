"""Turns the records of a finished run into one HTML file."""
