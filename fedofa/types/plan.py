"""A fine-tuning plan: which parameters of a subnet train, and how memory is saved meanwhile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedofa.types.errors import ConfigError

KEPT_FORMS = ("float32", "bfloat16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class FineTunePlan:
    """How one subnet is trained on one device.

    Which levers go together is `refusal`'s business; a plan outside its table cannot be made.

    Args:
        name: the kind of plan ("full", "last_blocks(2)", "head", "bias"), for people.
        trainable: the names of the parameters that train, in the subnet's order; everything else is frozen.
        recompute: segments, each the names of consecutive blocks: a segment keeps its input only and runs again in the
            backward pass (gradient checkpointing).
        statistics: for batch norm: "batch" normalises with each batch's own, "frozen" with the received ones.
        parametrised: whether small kernels are composed of the large ones and the kernel matrices, which train too.
        lean: operations that keep only what their gradients need (see `fedofa.finetune.ops`).
        micro_batch: examples that go through the network at a time, gradients being added up; 0 for the whole batch.
        kept: form in which lean operations keep activations: "float32" (as they are), "bfloat16", "int8" or "int4".
        kept_fraction: of each activation's values, those of largest magnitude, that lean operations keep.
        fused_step: the optimiser changes each parameter as soon as its gradient is there, and drops the gradient.
        feature_cache: what lies before the first layer that trains is computed once for each example and kept.
    """

    name: str
    trainable: tuple[str, ...]
    recompute: tuple[tuple[str, ...], ...] = ()
    statistics: str = "batch"
    parametrised: bool = False
    lean: bool = False
    micro_batch: int = 0
    kept: str = "float32"
    kept_fraction: float = 1.0
    fused_step: bool = False
    feature_cache: bool = False

    def __post_init__(self) -> None:
        if self.kept not in KEPT_FORMS:
            raise ConfigError(f"plan {self.name!r}, kept: expected one of {list(KEPT_FORMS)}, found {self.kept!r}")
        if not 0 < self.kept_fraction <= 1:
            raise ConfigError(
                f"plan {self.name!r}, kept_fraction: expected a number in (0, 1], found {self.kept_fraction!r}"
            )
        if self.micro_batch < 0:
            raise ConfigError(f"plan {self.name!r}, micro_batch: expected at least 0, found {self.micro_batch}")
        reason = refusal(self.levers)
        if reason:
            raise ConfigError(f"plan {self.name!r}: {reason}")

    @property
    def levers(self) -> frozenset[str]:
        """The names of the levers that the plan pulls (see `LEVERS`)."""
        pulled = {
            "micro_batch": self.micro_batch > 0,
            "recompute": bool(self.recompute),
            "lean": self.lean,
            "compressed": self.kept != "float32",
            "pruned": self.kept_fraction < 1,
            "fused_step": self.fused_step,
            "feature_cache": self.feature_cache,
        }
        return frozenset(name for name, pulls in pulled.items() if pulls)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal plan."""
        return {
            **asdict(self),
            "trainable": list(self.trainable),
            "recompute": [list(segment) for segment in self.recompute],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FineTunePlan:
        """The inverse of `to_json`."""
        try:
            given = {item.name: value[item.name] for item in fields(cls)}
            given["trainable"] = tuple(given["trainable"])
            given["recompute"] = tuple(tuple(segment) for segment in given["recompute"])
            return cls(**given)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a fine-tuning plan: {error!r} in {value!r:.200}") from error

    def digest(self) -> str:
        """16 hex digits over everything that the plan says."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


LEVERS = ("micro_batch", "recompute", "lean", "compressed", "pruned", "fused_step", "feature_cache")

_NEEDS = {"compressed": "lean", "pruned": "lean"}
"""Lever -> the lever without which it does nothing."""

_EXCLUDES = {
    frozenset({"compressed", "pruned"}): "pruned activations are kept as float32; choose kept or kept_fraction",
    frozenset({"micro_batch", "fused_step"}): (
        "a step that is fused into the backward pass would come after the first micro-batch; choose one of the two"
    ),
}
"""The pairs of levers that do not go together, and why. All other pairs do."""


def refusal(levers: frozenset[str]) -> str | None:
    """Why these levers do not go together; None where they do."""
    for lever in sorted(levers):
        if lever in _NEEDS and _NEEDS[lever] not in levers:
            return f"{lever} activations need lean operations; set lean"
    return next((reason for pair, reason in _EXCLUDES.items() if pair <= levers), None)
