"""Configuration files of a finished run: for the bundled engine, and for other serving engines."""
