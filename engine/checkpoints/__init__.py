"""Readers of models on disk: what a folder holds, checked before any of it is used."""
