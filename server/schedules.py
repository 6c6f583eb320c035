"""Shrinking schedules from settings, for training on one machine and for federations."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from conf.schema import ScheduleConf
from fedofa.shrinking.schedule import ShrinkSchedule, TeacherLoss
from fedofa.types.errors import ConfigError
from fedofa.types.space import SearchSpace

SCHEDULES = ("progressive", "sandwich", "turns", "attentive", "phases")

_READ_BY: dict[str, tuple[Any, str, str | None]] = {
    "candidates": (1, "attentive", "candidates"),
    "prefer": ("best", "attentive", "prefer"),
    "macs_targets": ([], "attentive", "macs_targets"),
    "teacher_share": (0.0, "turns", "teacher_weight"),
    "phases": ([], "phases", None),
}
"""Setting -> the value that says nothing, the schedule that reads it, and what a phase of a list has instead."""


def check_read(conf: ScheduleConf) -> None:
    """Refuse a setting that the schedule would not read.

    Raises:
        ConfigError: naming it and the schedule that does.
    """
    for name, (neutral, schedule, of_phase) in _READ_BY.items():
        found = getattr(conf, name)
        if found != neutral and conf.schedule != schedule:
            also = f"; in shrinking.phases a phase's {of_phase!r} says it" if of_phase else ""
            raise ConfigError(
                f"shrinking.{name}: only shrinking.schedule={schedule} reads it, found {found!r} with "
                f"{conf.schedule!r}; leave it out, or choose that schedule{also}"
            )


def build_schedule(conf: ScheduleConf, space: SearchSpace, steps: int | None) -> ShrinkSchedule:
    """The schedule that the settings name, `steps` long where it is not a list of phases.

    Raises:
        ConfigError: for an unknown one, or settings out of range or of another schedule.
    """
    if conf.schedule not in SCHEDULES:
        raise ConfigError(f"shrinking.schedule: expected one of {list(SCHEDULES)}, found {conf.schedule!r}")
    check_read(conf)
    if conf.schedule == "phases":
        return ShrinkSchedule.from_json({"phases": conf.phases})
    if steps is None:
        raise ConfigError(f"shrinking.steps: expected a whole number with {conf.schedule!r}, found null")
    loss = TeacherLoss(**{item.name: getattr(conf.teacher_loss, item.name) for item in fields(TeacherLoss)})
    match conf.schedule:
        case "progressive":
            return ShrinkSchedule.progressive(space, steps, loss)
        case "sandwich":
            return ShrinkSchedule.sandwich(space, steps, num_random=conf.num_random, loss=loss)
        case "turns":
            share = conf.teacher_share
            return ShrinkSchedule.turns(space, steps, num_random=conf.num_random, teacher_share=share, loss=loss)
        case _:
            return ShrinkSchedule.attentive(
                space,
                steps,
                num_random=conf.num_random,
                candidates=conf.candidates,
                prefer=conf.prefer,
                macs_targets=conf.macs_targets,
                loss=loss,
            )


def federated_schedule(conf: ScheduleConf, space: SearchSpace, rounds: int) -> ShrinkSchedule:
    """The schedule of a federation, in which every round is a step.

    Raises:
        ConfigError: when it does not have as many steps as there are rounds.
    """
    if conf.steps not in (None, rounds):
        raise ConfigError(
            f"shrinking.steps: every round is a step of the schedule, so expected {rounds} (rounds), found "
            f"{conf.steps}; leave it out, or give rounds={conf.steps}"
        )
    schedule = build_schedule(conf, space, rounds)
    if schedule.num_steps != rounds:
        raise ConfigError(
            f"rounds: expected {schedule.num_steps}, the steps of all shrinking.phases, found {rounds}; "
            f"give rounds={schedule.num_steps}"
        )
    schedule.check(space)
    return schedule
