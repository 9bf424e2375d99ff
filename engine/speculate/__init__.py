"""Speculative decoding: who drafts tokens, how many pay, and which are accepted."""
