"""Hostile and odd input to every op: ``python -m tests.fuzz.hostile --help``."""
