"""The diary of a run: one JSON line a round, written so that a killed run leaves whole lines only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedofa.evaluation.metrics import Score
from fedofa.types.errors import CheckpointError
from server.fleet import Assignment


@dataclass(slots=True)
class Attempt:
    """One try at a round: a cohort that was asked, and what came of it.

    Args:
        cohort: who was asked for what.
        quorum: verified deltas that the round needs.
        losses: (mean local training loss, examples) of every verified delta's client.
        failures: client id -> why its answer does not count.
        verified: deltas that passed verification.
        sitting_out: client id -> why it was not asked, though the cohort's draw took it (shrinking only).
        untaught: ids of clients that cannot hold the teacher that their phase asks for.
    """

    cohort: Sequence[Assignment]
    quorum: int
    losses: list[tuple[float, int]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    verified: int = 0
    sitting_out: Mapping[str, str] = field(default_factory=dict)
    untaught: Sequence[str] = ()

    @property
    def complete(self) -> bool:
        """Whether the quorum has answered."""
        return self.verified >= self.quorum


@dataclass(slots=True)
class RoundRecord:
    """What happened in one round.

    Args:
        round: from 1.
        attempts: the tries at it, the last one first to reach its quorum or the last that was allowed.
        covered_fraction: share of the trained tensors' coordinates that some client trained.
        delta_norm: L2 norm of the folded change.
        truncated: directions of badly conditioned kernel transforms left out, by tensor.
        bytes_down, bytes_up: payloads and answers of all attempts and of calibration, refused ones included.
        wall_seconds: of the round.
        scores: named subnets on the global test set, where evaluated.
        phase: of the shrinking schedule; "" without one.
        calibration_failures: client id -> why its statistics do not count.
        pair_failures: client id -> why its accuracy of some random subnet does not count.
    """

    round: int
    attempts: list[Attempt] = field(default_factory=list)
    covered_fraction: float = 0.0
    delta_norm: float = 0.0
    truncated: Mapping[str, int] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0
    wall_seconds: float = 0.0
    scores: Mapping[str, Score] = field(default_factory=dict)
    phase: str = ""
    calibration_failures: dict[str, str] = field(default_factory=dict)
    pair_failures: dict[str, str] = field(default_factory=dict)

    @property
    def current(self) -> Attempt:
        """The attempt that is under way or was the last."""
        return self.attempts[-1]

    @property
    def cohort(self) -> Sequence[Assignment]:
        """Who was asked in the last attempt."""
        return self.current.cohort

    @property
    def complete(self) -> bool:
        """Whether the round changed the shared weights; otherwise it was given up."""
        return self.current.complete

    @property
    def folded(self) -> int:
        """Deltas that were folded."""
        return self.current.verified if self.complete else 0

    @property
    def failures(self) -> list[tuple[int, str, str]]:
        """(attempt from 1, client id, why its answer does not count) over all attempts."""
        tries = enumerate(self.attempts, start=1)
        return [(number, name, why) for number, attempt in tries for name, why in sorted(attempt.failures.items())]

    @property
    def loss(self) -> float | None:
        """Mean local training loss over the folded clients, weighted by examples."""
        losses = sorted(self.current.losses) if self.complete else []
        examples = sum(count for _, count in losses)
        return sum(loss * count for loss, count in losses) / examples if examples else None

    def lament(self, lost: int) -> str:
        """Why a run ends whose clients do not answer: this is the last of `lost` rounds that were given up in a row."""
        attempt = self.current
        reasons = [f"{name}: {why}" for name, why in sorted(attempt.failures.items())[:3]]
        return (
            f"{lost} rounds in a row were given up, the last one round {self.round}: of {len(attempt.cohort)} clients "
            f"{attempt.verified} gave a usable answer, expected {attempt.quorum} (fleet.quorum_fraction); "
            f"{'; '.join(reasons or ['no client was available'])}. The weights are those of the last complete round; "
            "go on with resume=true when clients answer again"
        )

    def to_json(self) -> dict[str, Any]:
        """The round's line in `rounds.jsonl`."""
        return {
            "round": self.round,
            "outcome": "complete" if self.complete else "given up",
            "attempts": len(self.attempts),
            "cohort": [
                {
                    "client": item.client.client_id,
                    "device_class": item.client.profile.device_class,
                    "subnet": item.fit.subnet.digest(),
                    "plan": item.fit.plan.name,
                    "recompute": bool(item.fit.plan.recompute),
                    "num_examples": item.client.num_train,
                    "teacher": item.teacher.digest() if item.teacher else None,
                }
                for item in self.cohort
            ],
            "phase": self.phase or None,
            "sitting_out": dict(self.current.sitting_out),
            "untaught": list(self.current.untaught),
            "quorum": self.current.quorum,
            "folded": self.folded,
            "failures": [{"attempt": number, "client": name, "reason": why} for number, name, why in self.failures],
            "loss": self.loss,
            "covered_fraction": self.covered_fraction,
            "delta_norm": self.delta_norm,
            "truncated": dict(self.truncated),
            "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
            "calibration_failures": dict(self.calibration_failures),
            "pair_failures": dict(self.pair_failures),
            "wall_seconds": self.wall_seconds,
            "scores": {name: asdict(score) for name, score in self.scores.items()} or None,
        }


class Line(Protocol):
    """What a diary takes down: a round, or a step."""

    def to_json(self) -> dict[str, Any]:
        """The line's content."""
        ...


class RoundLog:
    """`rounds.jsonl` of one run (`steps.jsonl` where it trains on one machine)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Line) -> int:
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
