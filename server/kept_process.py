"""A command that ends, with all that comes of it, when this process does."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from fedofa.types.errors import RuntimeUnavailableError
from server.run_log import without_colours

_TAIL_LINES = 6


class KeptProcess:
    """A command under its keeper (`server.keeper`): all that comes of it ends with this object or this process."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], output: int | IO[bytes] | None
    ) -> None:
        program = shutil.which(command[0], path=environment["PATH"])
        if program is None:
            raise RuntimeUnavailableError(f"the command {command[0]!r} is missing; install flwr into this environment")
        self._log = log
        lifeline, self._lifeline = os.pipe()
        keeper = [sys.executable, "-P", "-m", "server.keeper", str(lifeline), program, *command[1:]]
        try:
            with log.open("wb") as file:
                self._process = subprocess.Popen(
                    keeper,
                    stdin=subprocess.DEVNULL,
                    stdout=file if output is None else output,
                    stderr=file,
                    pass_fds=[lifeline],
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for this process alone, which then ends them
                )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(lifeline)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdout(self) -> IO[bytes]:
        if self._process.stdout is None:
            raise RuntimeUnavailableError("the output of this process goes to its log")
        return self._process.stdout

    def poll(self, seconds: float = 0.0) -> int | None:
        """The exit status, or None if it still runs when the seconds have passed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def tail(self, num_lines: int = _TAIL_LINES) -> str:
        """The last lines of its log as one line."""
        lines = [" ".join(without_colours(line).split()) for line in self._log.read_text(errors="replace").splitlines()]
        return " | ".join([line for line in lines if line][-num_lines:]) or "it printed nothing"

    def close(self) -> None:
        """Kill it with all that came of it and wait; more calls do nothing."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        self._process.wait()
