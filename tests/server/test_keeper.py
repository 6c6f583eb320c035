"""A kept command ends with its lifeline and takes along all that it started; its exit status comes through."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Starts a process in a session of its own that ignores polite requests, says its id, and goes on or ends.
BREEDER = """
import subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(0, flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
{then}
"""
STARTER = """
import os, subprocess, sys, time
lifeline, ours = os.pipe()
subprocess.Popen([sys.executable, "-m", "server.keeper", str(lifeline), *sys.argv[1:]], pass_fds=[lifeline])
os.close(lifeline)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while alive(pid):
        assert time.monotonic() < deadline, "it outlived its keeper"
        time.sleep(0.02)


def start(*command: str) -> tuple[subprocess.Popen, int]:
    """A keeper and the end of the lifeline that this process holds."""
    lifeline, ours = os.pipe()
    keeper = [sys.executable, "-m", "server.keeper", str(lifeline), *command]
    process = subprocess.Popen(keeper, pass_fds=[lifeline], stdout=subprocess.PIPE, text=True)
    os.close(lifeline)
    return process, ours


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_the_exit_status_comes_through(code, status):
    process, ours = start(sys.executable, "-c", code)
    assert process.wait(30) == status
    process.stdout.close()
    os.close(ours)


@pytest.mark.parametrize("how", ["the lifeline ends", "the command ends"])
def test_whatever_the_command_started_is_gone(how):
    then = "time.sleep(600)" if how == "the lifeline ends" else ""
    process, ours = start(sys.executable, "-c", BREEDER.format(then=then))
    with process.stdout as output:
        grandchild = int(output.readline())
    if how == "the lifeline ends":
        assert alive(grandchild)
        os.close(ours)
    process.wait(30)
    wait_until_gone(grandchild)
    if how == "the command ends":
        os.close(ours)


def test_nothing_outlives_a_starter_that_is_killed():
    command = [sys.executable, "-c", STARTER, sys.executable, "-c", BREEDER.format(then="time.sleep(600)")]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with starter.stdout as output:
        grandchild = int(output.readline())
    assert alive(grandchild)
    starter.send_signal(signal.SIGKILL)
    starter.wait(30)
    wait_until_gone(grandchild)
