"""The console script's entry point, called in this process."""

from __future__ import annotations

import json
import sys

import pytest

import narrowcast_cli


class Result:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self):
        return json.loads(self.out)


def runner(monkeypatch, capsys):
    """A function that calls ``narrowcast ARGUMENTS...`` and returns its Result."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["narrowcast", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            narrowcast_cli.main()
        streams = capsys.readouterr()
        return Result(stop.value.code, streams.out, streams.err)

    return call


def one_line(result, code, text):
    """The form of every error: nothing on the output stream, one line that says what is wrong."""
    assert result.code == code, result.err
    assert result.out == ""
    assert result.err.startswith("narrowcast: ") and result.err.count("\n") == 1
    assert text in result.err
