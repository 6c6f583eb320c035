"""The log of a ServerApp on a SuperLink, as `flwr log` gives it: its own lines apart from Flower's."""

from __future__ import annotations

import re
from collections.abc import Callable

FLOWER_LINE = re.compile(r"\x1b\[\d+m(?P<level>[A-Z]+) *\x1b\[0m:|Using SuperLink: |Successfully installed ")
"""The beginning of a line that is Flower's and not the ServerApp's."""

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TRACEBACK_JOINTS = (
    "Traceback (most recent call last):",
    "During handling of the above exception, another exception occurred:",
    "The above exception was the direct cause of the following exception:",
)
_LAST_ERRORS = ("ServerApp raised an exception", "Exit Code: ")  # after which the ServerApp prints nothing more


def without_colours(line: str) -> str:
    """A line without the terminal's escape sequences."""
    return _ANSI.sub("", line)


class RunLog:
    """Sorts a ServerApp's lines: its own go to a report, an error of Flower's with its traceback is kept.

    Each connection gives the log from its beginning: after `rewind`, lines that were reported are not reported again.
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._num_reported = 0
        self.rewind()

    def rewind(self) -> None:
        """The next line is the first of the log."""
        self.failure: list[str] = []
        self._num_own = 0
        self._in_traceback = False
        self._ended = False

    def add(self, line: str) -> None:
        """Take the next line, without its end.

        `failure` is then, without colours, the last error with its traceback, or all from an error that ends the app.
        """
        flower = FLOWER_LINE.match(line)
        if self._ended:
            self.failure.append(without_colours(line))
        elif flower and flower["level"] == "ERROR":
            self.failure = [without_colours(line)]
            self._in_traceback = False
            self._ended = any(words in line for words in _LAST_ERRORS)
        elif flower:
            self._in_traceback = False
        elif self.failure and self._continues_failure(line):
            self.failure.append(without_colours(line))
        elif line:
            self._num_own += 1
            if self._num_own > self._num_reported:
                self._num_reported = self._num_own
                self._report(line)

    def _continues_failure(self, line: str) -> bool:
        """Whether a line is part of a traceback, which ends with its first line that is not indented."""
        if line in _TRACEBACK_JOINTS:
            self._in_traceback = line == _TRACEBACK_JOINTS[0]
            return True
        inside = self._in_traceback
        if line and not line[0].isspace():
            self._in_traceback = False
        return inside
