"""Models: one decoder, and one small file for each architecture family it serves."""
