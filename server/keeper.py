"""Runs one command that cannot outlive whoever started it: `python -m server.keeper LIFELINE_FD COMMAND ...`.

The lifeline is the reading end of a pipe whose other end only the starter holds, so that it ends with the starter,
however that ends. Then, and also when the command ends by itself, every process that came of the command is killed: on
Linux also those that left its session or whose parent is gone, because the keeper adopts orphans.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence

from server.resources import descendants

_POLL_SECONDS = 0.2
_PR_SET_CHILD_SUBREAPER = 36  # <sys/prctl.h>


def keep(lifeline_fd: int, command: Sequence[str]) -> int:
    """Run the command to its end or the lifeline's; returns its exit status once all of its processes are gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    process = subprocess.Popen(command)
    while process.poll() is None:
        if select.select([lifeline_fd], [], [], _POLL_SECONDS)[0]:
            process.kill()
            process.wait()
    _kill_family()
    return process.returncode


def _kill_family() -> None:
    while True:
        for pid in descendants(os.getpid())[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the command's exit status, 128 more than the signal's number where a signal ended it."""
    status = keep(int(arguments[0]), arguments[1:])
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
