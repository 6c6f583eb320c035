"""What following operators found, as a file: it takes seconds, and finds the same until the code changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fedofa
from fedofa.device.operators import Operator
from fedofa.finetune.operator_memory import OperatorTrace, Treatment
from fedofa.types.errors import CheckpointError

_FORMAT = "fedofa operator traces 1"
_FOLLOWED = ("finetune", "supernet", "device", "types")
"""The packages whose code decides what is found."""


def trace_key(operator: Operator, treatment: Treatment, dropout: float) -> str:
    """32 hex digits that name an operator and what a step does to it."""
    return hashlib.sha256(repr((operator, treatment, dropout)).encode()).hexdigest()[:32]


@cache
def code_digest() -> str:
    """32 hex digits over the code that is followed: torch's version, and the sources of fedofa that take part."""
    digest = hashlib.sha256(torch.__version__.encode())
    root = Path(fedofa.__file__).parent
    for path in sorted(path for name in _FOLLOWED for path in (root / name).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def write_traces(path: Path, traces: Mapping[str, OperatorTrace]) -> None:
    """Write traces by their keys into a file."""
    entries = {key: {**asdict(trace), "kernels": sorted(trace.kernels)} for key, trace in traces.items()}
    path.write_text(json.dumps({"format": _FORMAT, "code": code_digest(), "traces": entries}))


def read_traces(path: Path) -> dict[str, OperatorTrace]:
    """The traces that `write_traces` wrote.

    Raises:
        CheckpointError: when the file is none of these, is damaged, or was written by other code.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        found = content["format"], content["code"]
        traces = {key: _trace_of(fields) for key, fields in content["traces"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"operator traces {path}: {error!r}; delete the file, it will be made anew") from error
    if found != (_FORMAT, code_digest()):
        raise CheckpointError(
            f"operator traces {path}: expected {(_FORMAT, code_digest())}, found {found}; delete the file, it will be "
            "made anew"
        )
    return traces


def _trace_of(fields: dict[str, Any]) -> OperatorTrace:
    trace = OperatorTrace(**{**fields, "kernels": frozenset(fields["kernels"])})
    for name, expected in OperatorTrace.__annotations__.items():
        value = getattr(trace, name)
        if expected in ("int", "bool") and type(value).__name__ != expected:
            raise TypeError(f"{name}: expected {expected}, found {value!r}")
    if not all(isinstance(kernel, str) for kernel in trace.kernels):
        raise TypeError(f"kernels: expected strings, found {sorted(map(repr, trace.kernels))[:3]}")
    return trace
