"""`fedofa sweep`: Optuna searches settings for the best figures of a run; the study is one file and goes on from there.

Every trial is a whole run in a folder that its settings name, so a trial that was cut off is continued, not repeated.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from conf.compose import compose_conf, explain
from conf.multirun import key_of, parse_overrides, run_name
from fedofa.types.errors import ConfigError, DivergenceError, SweepError
from server.checkpoint import replace_file
from server.outputs import exclusive
from server.progress import wide_console
from server.runtimes import run_federation
from server.sweeps import announce, for_sweep, is_done, reason_of

if TYPE_CHECKING:
    import optuna

STUDY_FILE, SPACE_FILE = "study.sqlite", "space.json"
_PREFIX = "study."
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=,-]{0,99}")
_FAILED_RUN, _FAILURE = "failed_run", "failure"
"""User attributes of a trial that failed: the name of its run, and why it failed."""
_OF_SUBNET = ("accuracy", "client_test_accuracy", "loss", "macs", "params")
_OF_RUN = ("bytes_down", "bytes_up", "cpu_seconds", "wall_seconds", "peak_rss_bytes")
_MAXIMISED = ("accuracy", "client_test_accuracy")


@dataclass
class StudyConf:
    """The settings of a study, given as `study.KEY=VALUE`.

    Args:
        name: its folder below runs/studies; up to 100 letters, digits and "_.+=,-", the first a letter, digit or "_".
        objectives: figures of `summary.json`: "accuracy.largest", "loss.phone", "bytes_up"; accuracies are maximised,
            all others are minimised.
        trials: runs in all, those of earlier calls included.
        seed: of the sampler.
    """

    name: str = "study"
    objectives: list[str] = field(default_factory=lambda: ["accuracy.largest"])
    trials: int = 20
    seed: int = 0

    @property
    def folder(self) -> Path:
        """Where the study and its runs are."""
        return Path("runs/studies") / self.name


def run_study(overrides: Sequence[str]) -> Path:
    """Search until the study has as many trials as it was asked for; returns its folder.

    Trials that were cut off or failed before are gone on with first, with the settings they had.

    Args:
        overrides: `study.KEY=VALUE`; settings to search: `KEY=interval(a,b)`, `KEY=tag(log,interval(a,b))`,
            `KEY=range(a,b)` and `KEY=choice(a,b)`, also of groups; and settings that all trials share.

    Raises:
        ConfigError: before anything runs, for what does not compose, a range that cannot be searched, another study in
            the folder, or a missing extra.
        SweepError: at the end, with every trial of the study that failed and why.
    """
    parsed = parse_overrides(overrides)
    conf = _study_conf([item for item in parsed if str(item.key_or_group).startswith(_PREFIX)])
    searched = [item for item in parsed if item.is_sweep_override()]
    if not searched:
        raise ConfigError(
            "sweep: nothing to search; give a setting as KEY=interval(a,b), KEY=range(a,b) or KEY=choice(a,b)"
        )
    _check_searched(searched)
    fixed = [text for text, item in zip(overrides, parsed, strict=True) if _is_fixed(item)]
    compose_conf(fixed)
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("sweep: optuna is not installed; pip install 'fedofa[sweeps]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    conf.folder.mkdir(parents=True, exist_ok=True)
    with exclusive(conf.folder):
        space = {key_of(item): item.input_line or "" for item in searched}
        _same_study(conf, {**space, "fixed": sorted(fixed), "objectives": conf.objectives, "seed": conf.seed})
        study = _open_study(conf)
        _search(conf, study, searched, fixed)
        _print_best(conf, study)
        _check_none_failed(study)
    return conf.folder


def _is_fixed(override: Override) -> bool:
    return not override.is_sweep_override() and not str(override.key_or_group).startswith(_PREFIX)


def _study_conf(overrides: Sequence[Override]) -> StudyConf:
    try:
        given = {str(item.key_or_group).removeprefix(_PREFIX): item.value() for item in overrides}
        conf = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudyConf), given))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, _PREFIX)) from error
    if not isinstance(conf, StudyConf) or conf.trials < 1 or not conf.objectives:
        raise ConfigError("study: expected at least one trial and one objective; give study.trials, study.objectives")
    if not _NAME.fullmatch(conf.name):
        raise ConfigError(
            f"study.name: expected the name of a folder, of up to 100 letters, digits and '_.+=,-' and starting with "
            f"a letter, a digit or '_'; found {conf.name!r}"
        )
    for name in conf.objectives:
        figure, _, subnet = name.partition(".")
        if figure not in (_OF_SUBNET if subnet else _OF_RUN):
            known = ", ".join([*(f"{figure}.SUBNET" for figure in _OF_SUBNET), *_OF_RUN])
            raise ConfigError(f"study.objectives: unknown figure {name!r}; known: {known}")
    return conf


def _check_searched(searched: Sequence[Override]) -> None:
    """Refuse what cannot be searched, by the name of its setting."""
    names = [key_of(item) for item in searched]
    for name, item in zip(names, searched, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"{name}: expected one range, interval or choice, found {names.count(name)}")
        sweep = item.value()
        if isinstance(sweep, IntervalSweep):
            _interval(name, sweep)
        elif isinstance(sweep, RangeSweep):
            _check_range(name, sweep, item)
        elif not isinstance(sweep, ChoiceSweep) or not sweep.list or sweep.shuffle:
            raise ConfigError(f"{name}: expected choice(a,b) with values in a fixed order, found {item.input_line!r}")


def _interval(name: str, sweep: IntervalSweep) -> tuple[float, float, bool]:
    """The ends of an interval, and whether it is searched on a logarithmic scale."""
    low, high, log = sweep.start, sweep.end, "log" in sweep.tags
    if low is None or high is None or not 0 < high - low < math.inf or (log and low <= 0):
        expected = "a finite interval that rises" + (", from above 0 as it has the tag log" if log else "")
        raise ConfigError(f"{name}: expected {expected}; found interval({low},{high})")
    return low, high, log


def _check_range(name: str, sweep: RangeSweep, override: Override) -> None:
    start, stop, step = sweep.start, sweep.stop, sweep.step
    if start is None or stop is None or not 0 < (stop - start) * step < math.inf or sweep.shuffle:
        raise ConfigError(
            f"{name}: expected range(start,stop,step) in a fixed order and with at least one value before stop, "
            f"found {override.input_line!r}"
        )


def _same_study(conf: StudyConf, content: Mapping[str, Any]) -> None:
    """Refuse to mix two studies in one folder."""
    path = conf.folder / SPACE_FILE
    if not path.is_file():
        replace_file(path, json.dumps(content, indent=1).encode())
        return
    kept = json.loads(path.read_text())
    differing = sorted(key for key in {*kept, *content} if kept.get(key) != content.get(key))
    if differing:
        first = differing[0]
        raise ConfigError(
            f"{conf.folder} holds a study with another {first}: {kept.get(first)!r} then, {content.get(first)!r} now; "
            "give the study another study.name"
        )


def _open_study(conf: StudyConf) -> optuna.Study:
    import optuna
    from optuna.study import StudyDirection

    up, down = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
    directions = [up if name.startswith(_MAXIMISED) else down for name in conf.objectives]
    storage = f"sqlite:///{(conf.folder / STUDY_FILE).resolve()}"
    return optuna.create_study(storage=storage, study_name=conf.name, directions=directions, load_if_exists=True)


def _search(conf: StudyConf, study: optuna.Study, searched: Sequence[Override], fixed: Sequence[str]) -> None:
    """Run the trials that are missing; one that fails stays unfinished, with the reason, for a later call to run."""
    from optuna.trial import Trial

    for number in range(conf.trials):
        trials = study.get_trials(deepcopy=False)
        if number < len(trials) and trials[number].state.is_finished():
            continue
        # A sampler of its own for every trial, so that a study that goes on draws what it would have drawn.
        study.sampler = _sampler(conf, number)
        trial = Trial(study, trials[number]._trial_id) if number < len(trials) else study.ask()
        settings = [_suggest(trial, item) for item in searched]
        name = run_name(settings, [key_of(item) for item in searched])
        try:
            figures = _run_trial(conf, [*fixed, *settings], name)
        except Exception as error:  # a fault of this trial must not end the others
            reason = reason_of(error)
            trial.set_user_attr(_FAILED_RUN, name)
            trial.set_user_attr(_FAILURE, reason)
            announce(f"{name}: failed: {reason}")
        else:
            study.tell(trial, figures)


def _check_none_failed(study: optuna.Study) -> None:
    """Tell all failed trials of the study, those that earlier calls left included."""
    trials = study.get_trials(deepcopy=False)
    failed = [trial for trial in trials if _FAILURE in trial.user_attrs and not trial.state.is_finished()]
    if failed:
        reasons = "; ".join(f"{trial.user_attrs[_FAILED_RUN]}: {trial.user_attrs[_FAILURE]}" for trial in failed)
        raise SweepError(
            f"{len(failed)} of {len(trials)} trials failed; to try them again, give the same command with "
            f"study.trials={len(trials)} or more; to search without them, give another study.name: {reasons}"
        )


def _sampler(conf: StudyConf, number: int) -> optuna.samplers.BaseSampler:
    from optuna.samplers import TPESampler

    return TPESampler(seed=zlib.crc32(f"{conf.seed}/{number}".encode()))


def _suggest(trial: optuna.Trial, override: Override) -> str:
    """One setting of a trial, as an override."""
    key, sweep = override.get_key_element(), override.value()
    name = key_of(override)
    if isinstance(sweep, IntervalSweep):
        low, high, log = _interval(name, sweep)
        if isinstance(low, int) and isinstance(high, int):
            return f"{key}={trial.suggest_int(name, low, high, log=log)}"
        return f"{key}={trial.suggest_float(name, low, high, log=log)}"
    if isinstance(sweep, RangeSweep) and isinstance(values := sweep.range(), range):
        return f"{key}={trial.suggest_int(name, min(values), max(values), step=abs(values.step))}"
    return f"{key}={trial.suggest_categorical(name, [str(value) for value in override.sweep_string_iterator()])}"


def _run_trial(conf: StudyConf, settings: Sequence[str], name: str) -> list[float]:
    """The objectives of one run, which is made, continued or found done."""
    checked = for_sweep(compose_conf(settings), conf.folder / name, 1)
    if not is_done(checked):
        wide_console(stderr=True).print(name, style="bold", markup=False, highlight=False)
        run_federation(checked)
    summary = json.loads((Path(checked.output_dir) / "summary.json").read_text())
    return [figure_of(summary, objective) for objective in conf.objectives]


def figure_of(summary: Mapping[str, Any], name: str) -> float:
    """A figure of a run's summary: "bytes_up", or "accuracy.largest" of a watched subnet.

    Raises:
        ConfigError: where the run has no such figure.
        DivergenceError: where the figure is not finite.
    """
    figure, _, subnet = name.partition(".")
    rows = {row["name"]: row for row in summary["subnets"]} if subnet else {"": summary}
    value = rows.get(subnet, {}).get(figure)
    if not isinstance(value, int | float):
        have = f"; its subnets are {', '.join(rows)}" if subnet and subnet not in rows else ""
        raise ConfigError(f"study.objectives: the run has no figure {name!r}{have}")
    if not math.isfinite(value):
        raise DivergenceError(f"study.objectives: expected a finite {name}, found {value}; search a narrower range")
    return float(value)


def _print_best(conf: StudyConf, study: optuna.Study) -> None:
    """The best trial, or with several objectives the ones that no other beats in all of them."""
    single = len(conf.objectives) == 1
    table = Table("trial", *conf.objectives, "settings", title="best trial" if single else "Pareto set")
    for trial in study.best_trials:
        figures = [f"{value:.4g}" for value in trial.values or ()]
        settings = ", ".join(f"{key}={value}" for key, value in trial.params.items())
        table.add_row(str(trial.number), *figures, settings)
    wide_console().print(table)
    print(f"{len(study.get_trials(deepcopy=False))} trials are in {conf.folder}; compare them with fedofa compare")
