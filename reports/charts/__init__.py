"""Inline-SVG charts, one kind a file; each returns a `Figure`."""
