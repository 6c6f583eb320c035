"""Environment variables of a run's processes; they are read when numpy, torch, Flower or Ray is first imported."""

from __future__ import annotations

import os
from collections.abc import Mapping

ONE_THREAD: Mapping[str, str] = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""The clients' processes keep every core busy: more threads in one of them only make others wait (ADR 6)."""

SILENT_FLOWER: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""Flower reports nothing, looks nothing up and installs nothing."""

KEPT_PAGES: Mapping[str, str] = {
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
}
"""glibc keeps what one client's task frees for the next one, instead of returning pages and faulting them in again."""


def adopt(*groups: Mapping[str, str]) -> None:
    """Set the variables in this process, for itself and what it starts."""
    for group in groups:
        os.environ.update(group)
