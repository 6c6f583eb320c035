"""Shrinking schedules from settings, for training on one machine and for federations."""

from __future__ import annotations

from dataclasses import fields

from conf.schema import ScheduleConf
from fedofa.shrinking.schedule import ShrinkSchedule, TeacherLoss
from fedofa.types.errors import ConfigError
from fedofa.types.space import SearchSpace

SCHEDULES = ("progressive", "sandwich", "turns", "attentive", "phases")


def build_schedule(conf: ScheduleConf, space: SearchSpace, steps: int) -> ShrinkSchedule:
    """The schedule that the settings name, `steps` long where it is not a list of phases.

    Raises:
        ConfigError: for an unknown one, or settings out of range.
    """
    if conf.schedule not in SCHEDULES:
        raise ConfigError(f"shrinking.schedule: expected one of {list(SCHEDULES)}, found {conf.schedule!r}")
    loss = TeacherLoss(**{item.name: getattr(conf.teacher_loss, item.name) for item in fields(TeacherLoss)})
    match conf.schedule:
        case "progressive":
            return ShrinkSchedule.progressive(space, steps, loss)
        case "sandwich":
            return ShrinkSchedule.sandwich(space, steps, num_random=conf.num_random, loss=loss)
        case "turns":
            share = conf.teacher_share
            return ShrinkSchedule.turns(space, steps, num_random=conf.num_random, teacher_share=share, loss=loss)
        case "attentive":
            return ShrinkSchedule.attentive(
                space,
                steps,
                num_random=conf.num_random,
                candidates=conf.candidates,
                prefer=conf.prefer,
                macs_targets=conf.macs_targets,
                loss=loss,
            )
        case _:
            return ShrinkSchedule.from_json({"phases": conf.phases})


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
