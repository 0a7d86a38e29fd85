"""Errors that narrowcast raises from Python. Ops raise RuntimeError: the stable ABI knows no other type."""


class Error(Exception):
    """Base of every error that narrowcast raises from Python."""


class ArgumentError(Error, ValueError):
    """An argument has a value that cannot be used; the text says what was expected."""


class FormatError(Error):
    """The content of a file is not what its format promises (truncated, corrupted, hostile)."""


class UnsupportedError(Error):
    """The input is valid, but this version cannot do it; the text says what would be needed."""


class VerificationError(Error):
    """A plan no longer reproduces the outputs in its certificate."""
