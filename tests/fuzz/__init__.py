"""Hostile and odd input to every op: ``python -m fuzz.hostile --help``."""
