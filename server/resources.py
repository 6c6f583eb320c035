"""What a run uses: wall time, CPU time and peak memory of this process and its workers."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def available_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Stopwatch:
    """Time and memory since it was made, over this process and its living descendants (Linux; else this process)."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._cpu = tree_usage()[0]

    def wall_seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._wall

    def cpu_seconds(self) -> float:
        """User and system seconds since the start; a worker that died takes its own with it."""
        return max(0.0, tree_usage()[0] - self._cpu)

    def peak_rss_bytes(self) -> int:
        """The sum of every process's peak resident memory; pages that processes share count in each."""
        return tree_usage()[1]


def tree_usage() -> tuple[float, int]:
    """CPU seconds (finished children included) and summed peak resident bytes of this process and its descendants."""
    proc = Path("/proc")
    if not (proc / "self/stat").exists():
        times = os.times()
        return sum(times[:4]), 0
    seconds, peak = 0.0, 0
    for pid in descendants(os.getpid()):
        try:
            fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
            status = (proc / str(pid) / "status").read_text()
        except OSError:
            continue  # it ended meanwhile
        seconds += sum(int(value) for value in fields[11:15]) / _TICKS
        peak += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0) * 1024
    return seconds, peak


def memory_file_bytes(root: int) -> tuple[int, int]:
    """Memory files that a process holds now, and that it and all its descendants hold; one held by two counts once.

    They are in no process's resident memory unless it maps them. Linux only; `root` must live.
    """
    sizes: dict[int, int] = {}
    _add_memory_files(root, sizes)
    own = sum(sizes.values())
    for pid in descendants(root):
        _add_memory_files(pid, sizes)
    return own, sum(sizes.values())


def resident_bytes(root: int) -> int:
    """Resident memory of a process and all its descendants now; pages that several of them share count once."""
    return sum(map(_proportional_bytes, descendants(root)))


def _add_memory_files(pid: int, sizes: dict[int, int]) -> None:
    """Inode -> allocated bytes of every anonymous memory file that the process has open."""
    with contextlib.suppress(OSError):  # the process ended meanwhile
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # it closed this one
                if os.readlink(entry).startswith("/memfd:"):
                    status = entry.stat()
                    sizes[status.st_ino] = status.st_blocks * 512


def _proportional_bytes(pid: int) -> int:
    """Resident memory of a process; of a page that n processes map, one n-th."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0) * 1024


def descendants(root: int) -> list[int]:
    """The ids of a process and of all its descendants, as far as they live (Linux; elsewhere the process alone)."""
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found
