"""A fine-tuning plan: which parameters of a subnet train, and how memory is saved meanwhile."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fedofa.types.errors import ConfigError

KEPT_FORMS = ("float32", "bfloat16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class FineTunePlan:
    """How one subnet is trained on one device.

    Which levers go together is `refusal`'s business; a plan outside its table cannot be made.

    Args:
        name: the kind of plan ("full", "last_blocks(2)", "head", "bias"), for people.
        trainable: the names of the parameters that train, in the subnet's order; everything else but `low_rank` is
            frozen.
        recompute: segments, each the names of consecutive blocks: a segment keeps its input only and runs again in the
            backward pass (gradient checkpointing).
        statistics: for batch norm: "batch" normalises with each batch's own, "frozen" with the received ones.
        parametrised: whether small kernels are composed of the large ones and the kernel matrices, which train too.
        lean: operations that keep only what their gradients need (see `fedofa.finetune.ops`).
        micro_batch: examples that go through the network at a time, gradients being added up; 0 for the whole batch.
        kept: form in which lean operations keep activations: "float32" (as they are), "bfloat16", "int8" or "int4".
        kept_fraction: of each activation's values, those of largest magnitude, that lean operations keep.
        fused_step: gradients have no memory of their own: the optimiser changes each parameter as soon as its gradient
            is there, and drops the gradient; with micro-batches, gradients are added to the optimiser's momentum.
        feature_cache: what lies before the first layer that trains is computed once for each example and kept.
        fractions: weights among the trainable ones of which only a leading part trains (see `part_shape`), each with
            the fraction of its channels.
        low_rank: weights whose change is the product of two trained factors, in the subnet's order (see
            `factor_shapes`).
        rank: of those products, at most; 0 where there are none.
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
    fractions: tuple[tuple[str, float], ...] = ()
    low_rank: tuple[str, ...] = ()
    rank: int = 0

    def __post_init__(self) -> None:
        if self.kept not in KEPT_FORMS:
            raise ConfigError(f"plan {self.name!r}, kept: expected one of {list(KEPT_FORMS)}, found {self.kept!r}")
        if not 0 < self.kept_fraction <= 1:
            raise ConfigError(
                f"plan {self.name!r}, kept_fraction: expected a number in (0, 1], found {self.kept_fraction!r}"
            )
        if self.micro_batch < 0:
            raise ConfigError(f"plan {self.name!r}, micro_batch: expected at least 0, found {self.micro_batch}")
        self._check_parts()
        reason = refusal(self.levers)
        if reason:
            raise ConfigError(f"plan {self.name!r}: {reason}")

    def _check_parts(self) -> None:
        for name, fraction in self.fractions:
            if not 0 < fraction <= 1 or name not in self.trainable:
                raise ConfigError(
                    f"plan {self.name!r}, fractions: expected a trainable weight and a number in (0, 1], found "
                    f"{name!r} and {fraction!r}"
                )
        if self.rank < 0 or bool(self.rank) != bool(self.low_rank):
            raise ConfigError(
                f"plan {self.name!r}, rank: expected at least 1 for weights of low rank and 0 without any, found "
                f"{self.rank} for {len(self.low_rank)}"
            )
        twice = set(self.low_rank) & set(self.trainable)
        if twice:
            raise ConfigError(
                f"plan {self.name!r}: {sorted(twice)[:3]} train as they are and by factors; choose one of the two"
            )

    @property
    def changes(self) -> tuple[str, ...]:
        """The names of all parameters that training changes."""
        return self.trainable + self.low_rank

    def part_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what trains of a trainable parameter: all of it, or a leading part of its channels.

        Args:
            shape: the parameter's. The channels of a depthwise convolution `(channels, 1, k, k)` are its first
                dimension, those of any other weight its input channels, the second: a gradient of the first
                so many needs no other channels of the layer's input.
        """
        fraction = dict(self.fractions).get(name) if self.fractions else None
        if fraction is None:
            return shape
        dim = 0 if shape[1] == 1 else 1
        return *shape[:dim], leading_count(fraction, shape[dim]), *shape[dim + 1 :]

    def factor_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the left and the right factor, `(out, rank)` and `(rank, in)`, for a weight of that shape."""
        rank = min(self.rank, *shape[:2])
        return (shape[0], rank), (rank, shape[1])

    def num_trained(self, name: str, shape: tuple[int, ...]) -> int:
        """Values that train, and travel back, of a parameter that the plan changes, given its shape."""
        if name in self.low_rank:
            return sum(map(math.prod, self.factor_shapes(shape)))
        return math.prod(self.part_shape(name, shape))

    def part(self, names: Mapping[str, str]) -> FineTunePlan:
        """What the plan does to some parameters, without segments of recomputation.

        Args:
            names: of the parameters, each with its name in the part.
        """
        low_rank = tuple(names[name] for name in self.low_rank if name in names)
        return replace(
            self,
            trainable=tuple(names[name] for name in self.trainable if name in names),
            recompute=(),
            fractions=tuple((names[name], fraction) for name, fraction in self.fractions if name in names),
            low_rank=low_rank,
            rank=self.rank if low_rank else 0,
        )

    @property
    def sums_in_momentum(self) -> bool:
        """Whether SGD's momentum is what gradients are added to, so that one value a parameter serves for both."""
        return self.fused_step and self.micro_batch > 0

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
            "fractions": [list(item) for item in self.fractions],
            "low_rank": list(self.low_rank),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FineTunePlan:
        """The inverse of `to_json`."""
        try:
            given = {item.name: value[item.name] for item in fields(cls)}
            for key in ("trainable", "low_rank"):
                given[key] = tuple(given[key])
            for key in ("recompute", "fractions"):
                given[key] = tuple(tuple(item) for item in given[key])
            return cls(**given)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a fine-tuning plan: {error!r} in {value!r:.200}") from error

    def digest(self) -> str:
        """16 hex digits over everything that the plan says."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def leading_count(fraction: float, channels: int) -> int:
    """How many channels a fraction of them is, at least one; a client and the server agree on it to the channel."""
    return max(1, math.ceil(round(fraction * channels, 6)))


LEVERS = ("micro_batch", "recompute", "lean", "compressed", "pruned", "fused_step", "feature_cache")

_NEEDS = {"compressed": "lean", "pruned": "lean"}
"""Lever -> the lever without which it does nothing."""

_EXCLUDES = {
    frozenset({"compressed", "pruned"}): "pruned activations are kept as float32; choose kept or kept_fraction",
}
"""The pairs of levers that do not go together, and why. All other pairs do."""


def refusal(levers: frozenset[str]) -> str | None:
    """Why these levers do not go together; None where they do."""
    for lever in sorted(levers):
        if lever in _NEEDS and _NEEDS[lever] not in levers:
            return f"{lever} activations need lean operations; set lean"
    return next((reason for pair, reason in _EXCLUDES.items() if pair <= levers), None)
