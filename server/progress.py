"""What a person sees while a run goes on: the fleet, then a bar with round or step, accuracy or loss, and time left."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from fedofa.search.fit import Fit
from server.fleet import FleetPlan
from server.rounds import RoundRecord

_MOST_NAMED = 3
"""Clients that sit out whose reasons are printed."""


def wide_console(*, stderr: bool = False) -> Console:
    """A console that does not fold tables to 80 columns where its output is not a terminal."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=140)


def say(note: str | None) -> None:
    """Print what the user should know before a run begins, if there is anything."""
    if note:
        wide_console(stderr=True).print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True, highlight=False)


def sitting_out_lines(sitting_out: Mapping[str, str]) -> list[str]:
    """Who takes no part and why, the first few by name; `summary.json` lists all of them."""
    named = list(sitting_out.items())[:_MOST_NAMED]
    lines = [f"{client} sits out: {reason}" for client, reason in named]
    more = len(sitting_out) - len(named)
    return [*lines, f"{more} more sit out; summary.json says why"] if more else lines


class _Display:
    """A bar with what is done, a status and the time left within its context; no bar where there is no terminal."""

    def __init__(self, console: Console | None) -> None:
        self._console = console or wide_console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


class Progress(_Display):
    """Watches one run after the other; on a terminal as a moving bar, elsewhere as a line an evaluation."""

    def __init__(self, num_rounds: int, console: Console | None = None) -> None:
        super().__init__(console)
        self._num_rounds = num_rounds
        self._title = "FedOFA"
        self._task = None
        self._accuracy = ""

    def next_run(self, title: str) -> None:
        """Another run follows under this title."""
        self._title, self._task, self._accuracy = title, None, ""

    def fleet_planned(self, plan: FleetPlan) -> None:
        """Show who trains what, and who sits out and why."""
        table = Table(
            "device class", "clients", "MMACs", "parameters", "memory", "round", "limited by", title=self._title
        )
        for name, (fit, clients) in plan.classes().items():
            table.add_row(name, str(clients), *_cells(fit))
        self._console.print(table)
        for line in sitting_out_lines(plan.sitting_out):
            self._console.print(f"[yellow]{escape(line)}[/yellow]", highlight=False)

    def round_finished(self, record: RoundRecord) -> None:
        """Move the bar."""
        if self._task is None:
            self._task = self._bars.add_task(self._title, total=self._num_rounds, status="", completed=record.round - 1)
        if record.scores:
            self._accuracy = "  ".join(f"{name} {score.accuracy:.3f}" for name, score in record.scores.items())
        loss = f"loss {record.loss:.3f}" if record.loss is not None else "round given up"
        failed = f", {len(record.failures)} failed" if record.failures else ""
        status = f"{record.folded} of {len(record.cohort)} clients{failed}, {loss} | {self._accuracy}"
        self._bars.update(self._task, completed=record.round, status=status)
        if not record.complete:
            self._console.print(f"[yellow]{escape(_given_up(record))}[/yellow]", highlight=False)
        if record.scores and not self._console.is_terminal:
            line = f"{self._title}: round {record.round} of {self._num_rounds}: {status}"
            self._console.print(line, soft_wrap=True, markup=False)


class StepProgress(_Display):
    """Watches a training on this machine; on a terminal as a moving bar, elsewhere as a line a checkpoint."""

    def __init__(self, num_steps: int, done: int, console: Console | None = None) -> None:
        super().__init__(console)
        self._num_steps = num_steps
        self._task = self._bars.add_task("shrinking", total=num_steps, completed=done, status="")

    def step_finished(self, line: Mapping[str, Any], *, report: bool) -> None:
        """Move the bar; `line` is the step's in `steps.jsonl`, `report` asks for a line where there is no bar."""
        status = f"{line['phase']}: loss {line['loss']:.3f} over {len(line['losses'])} subnets"
        self._bars.update(self._task, completed=line["step"], status=status)
        if report and not self._console.is_terminal:
            text = f"step {line['step']:,} of {self._num_steps:,}, {status}"
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)


class CountProgress(_Display):
    """Watches things being done one after the other; on a terminal as a moving bar, elsewhere a line now and then."""

    def __init__(self, title: str, total: int, done: int, console: Console | None = None) -> None:
        super().__init__(console)
        self._title, self._total = title, total
        self._task = self._bars.add_task(title, total=total, completed=done, status="")

    def status(self, text: str) -> None:
        """Say what goes on."""
        self._bars.update(self._task, status=text)

    def done(self, count: int, text: str) -> None:
        """So many are done by now."""
        self._bars.update(self._task, completed=count, status=text)
        if not self._console.is_terminal:
            line = f"{self._title}: {count:,} of {self._total:,}, {text}"
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def _given_up(record: RoundRecord) -> str:
    reasons = "; ".join(f"{name}: {why}" for _, name, why in record.failures[-3:])
    answers = f"{record.current.verified} of {len(record.cohort)} clients answered, expected {record.current.quorum}"
    return f"round {record.round} given up after {len(record.attempts)} attempts: {answers}. {reasons}"


def _cells(fit: Fit) -> list[str]:
    cost = fit.cost
    return [
        f"{cost.macs / 1e6:.2f}",
        f"{cost.num_parameters:,}",
        f"{cost.training_bytes / 1e6:.1f} MB" + (" (recomputed)" if fit.plan.recompute else ""),
        f"{cost.round_seconds:.1f} s",
        fit.binding,
    ]
