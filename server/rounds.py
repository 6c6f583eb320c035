"""The diary of a run: one JSON line a round, written so that a killed run leaves whole lines only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedofa.evaluation.metrics import Score
from fedofa.types.errors import CheckpointError
from server.fleet import Assignment


@dataclass(slots=True)
class RoundRecord:
    """What happened in one round.

    Args:
        round: from 1.
        cohort: who was asked for what.
        losses: (mean local training loss, examples) of every folded client.
        failures: client id -> why its round does not count.
        folded: deltas that were folded.
        covered_fraction: share of the trained tensors' coordinates that some client trained.
        delta_norm: L2 norm of the folded change.
        truncated: directions of badly conditioned kernel transforms left out, by tensor.
        bytes_down, bytes_up: payloads and deltas, refused ones included.
        wall_seconds: of the round.
        scores: named subnets on the global test set, where evaluated.
    """

    round: int
    cohort: Sequence[Assignment]
    losses: list[tuple[float, int]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    folded: int = 0
    covered_fraction: float = 0.0
    delta_norm: float = 0.0
    truncated: Mapping[str, int] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    wall_seconds: float = 0.0
    scores: Mapping[str, Score] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """Mean local training loss over the folded clients, weighted by examples."""
        examples = sum(count for _, count in self.losses)
        return sum(loss * count for loss, count in sorted(self.losses)) / examples if examples else None

    def to_json(self) -> dict[str, Any]:
        """The round's line in `rounds.jsonl`."""
        return {
            "round": self.round,
            "cohort": [
                {
                    "client": item.client.client_id,
                    "device_class": item.client.profile.device_class,
                    "subnet": item.fit.subnet.digest(),
                    "plan": item.fit.plan.name,
                    "recompute": bool(item.fit.plan.recompute),
                    "num_examples": item.client.num_train,
                }
                for item in self.cohort
            ],
            "folded": self.folded,
            "failures": [{"client": name, "reason": why} for name, why in sorted(self.failures.items())],
            "loss": self.loss,
            "covered_fraction": self.covered_fraction,
            "delta_norm": self.delta_norm,
            "truncated": dict(self.truncated),
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "wall_seconds": self.wall_seconds,
            "scores": {name: asdict(score) for name, score in self.scores.items()} or None,
        }


class RoundLog:
    """`rounds.jsonl` of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: RoundRecord) -> int:
        """Add a line, flush it to disk and return the file's length in bytes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(json.dumps(record.to_json()).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, length: int) -> None:
        """Drop what was written after the checkpoint that a run goes on from."""
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < length:
            raise CheckpointError(
                f"{self.path} is shorter ({found:,} bytes) than when the checkpoint was made ({length:,}); restore the "
                "file, or start again without resume"
            )
        if found:
            os.truncate(self.path, length)

    def read(self) -> list[dict[str, Any]]:
        """All lines."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
