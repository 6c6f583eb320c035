"""What the server knows between rounds: the shared weights, the channel orderings and the optimiser's moments."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class SharedState:
    """One version of the shared weights; folding makes the next one and leaves this one as it is.

    Args:
        version: 0 at the start, one more with every fold.
        tensors: shared tensor name -> array: parameters, kernel matrices and batch-norm statistics.
        ordering: channel group name -> int64 permutation, most important channel first; a group left out is in order.
        moments: server optimiser moment ("momentum", "second", "steps") -> tensor name -> array; under "teacher" the
            tensors of a shrinking schedule's trained teacher, under "answers" a teacher's logits by batch.
    """

    version: int
    tensors: Mapping[str, np.ndarray]
    ordering: Mapping[str, np.ndarray] = field(default_factory=dict)
    moments: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 (hex) over names, types, shapes and bytes of the tensors and orderings; moments and version apart."""
        digest = hashlib.sha256()
        for prefix, arrays in (("tensor", self.tensors), ("ordering", self.ordering)):
            for name in sorted(arrays):
                array = np.ascontiguousarray(arrays[name])
                digest.update(f"{prefix}:{name}:{array.dtype.str}:{array.shape};".encode())
                digest.update(array.data)
        return digest.hexdigest()
