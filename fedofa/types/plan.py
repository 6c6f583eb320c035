"""A fine-tuning plan: which parameters of a subnet train, and what is recomputed instead of kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedofa.types.errors import ConfigError


@dataclass(frozen=True, slots=True)
class FineTunePlan:
    """How one subnet is trained on one device.

    Args:
        name: the kind of plan ("full", "last_blocks(2)", "head", "bias"), for people.
        trainable: the names of the parameters that train, in the subnet's order; everything else is frozen.
        recompute: names of the blocks whose activations are recomputed in the backward pass (gradient checkpointing).
        statistics: for batch norm: "batch" normalises with each batch's own, "frozen" with the received ones.
        parametrised: whether small kernels are composed of the large ones and the kernel matrices, which train too.
    """

    name: str
    trainable: tuple[str, ...]
    recompute: tuple[str, ...] = ()
    statistics: str = "batch"
    parametrised: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal plan; "parametrised" is there where it is true."""
        return {
            "name": self.name,
            "trainable": list(self.trainable),
            "recompute": list(self.recompute),
            "statistics": self.statistics,
            **({"parametrised": True} if self.parametrised else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FineTunePlan:
        """The inverse of `to_json`."""
        try:
            return cls(
                str(value["name"]),
                tuple(value["trainable"]),
                tuple(value["recompute"]),
                str(value["statistics"]),
                bool(value.get("parametrised", False)),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a fine-tuning plan: {error!r} in {value!r:.200}") from error

    def digest(self) -> str:
        """16 hex digits over everything that the plan says."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
