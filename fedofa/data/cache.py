"""Cache entries on disk that many processes share: built once, published atomically, rebuilt when damaged."""

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

_logger = logging.getLogger(__name__)
T = TypeVar("T")


def load_cached(entry: Path, load: Callable[[Path], T], build: Callable[[Path], None]) -> T:
    """Return `load(entry)`, building the file or directory `entry` first when it is missing or damaged.

    Of several processes that need the same entry one builds it while the others wait. `build` writes to the path it
    is given, which becomes `entry` by a rename once everything is on disk: a killed build leaves no half entry.
    An entry is damaged when `load` raises; what `build` raises, and `load` just after it, reaches the caller.
    """
    cached = _load_or_none(entry, load)
    if cached is not None:
        return cached
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(entry.with_name(f".lock-{entry.name}")):
        cached = _load_or_none(entry, load)  # another process may have built it in the meantime
        if cached is None:
            _build_and_publish(entry, build)
            cached = load(entry)
    return cached


def _load_or_none(entry: Path, load: Callable[[Path], T]) -> T | None:
    """Return `load(entry)`, or None when it fails: whatever ails a cache entry, building it again is the cure."""
    try:
        return load(entry)
    except Exception:
        return None


@contextmanager
def _exclusive(lock_path: Path) -> Iterator[None]:
    """Hold an advisory lock that the kernel releases when its process dies."""
    with open(lock_path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_and_publish(entry: Path, build: Callable[[Path], None]) -> None:
    """Build beside `entry`, then take its place; the caller holds the lock, so a leftover here has no owner."""
    staging = entry.with_name(f".building-{entry.name}")
    _remove(staging)
    try:
        build(staging)
        _fsync_all(staging)
        if entry.exists():
            _logger.warning("cache entry %s is damaged and was built again", entry)
            _remove(entry)
        os.rename(staging, entry)
        _fsync(entry.parent)
    finally:
        _remove(staging)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync_all(path: Path) -> None:
    """Flush a file, or a directory with the files in it, to the disk."""
    if path.is_dir():
        for child in path.iterdir():
            _fsync(child)
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
