"""`fedofa sweep`: Optuna searches settings for the best figures of a run; the study is one file and goes on from there.

Every trial is a whole run in a folder that its settings name, so a trial that was cut off is continued, not repeated.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from conf.compose import compose_conf, explain
from conf.multirun import key_of, parse_overrides, run_name
from fedofa.types.errors import ConfigError, FedofaError, SweepError
from server.checkpoint import replace_file
from server.outputs import exclusive
from server.progress import wide_console
from server.runtimes import run_federation
from server.sweeps import for_sweep, is_done

if TYPE_CHECKING:
    import optuna

STUDY_FILE, SPACE_FILE = "study.sqlite", "space.json"
_PREFIX = "study."
_OF_SUBNET = ("accuracy", "client_test_accuracy", "loss", "macs", "params")
_OF_RUN = ("bytes_down", "bytes_up", "cpu_seconds", "wall_seconds", "peak_rss_bytes")
_MAXIMISED = ("accuracy", "client_test_accuracy")


@dataclass
class StudyConf:
    """The settings of a study, given as `study.KEY=VALUE`.

    Args:
        name: its folder below runs/studies.
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

    Args:
        overrides: `study.KEY=VALUE`; settings to search: `KEY=interval(a,b)`, `KEY=tag(log,interval(a,b))`,
            `KEY=range(a,b)` and `KEY=choice(a,b)`, also of groups; and settings that all trials share.

    Raises:
        ConfigError: before anything runs, for what does not compose, another study in the folder, or a missing extra.
        SweepError: at the end, with the trials that failed and why.
    """
    parsed = parse_overrides(overrides)
    conf = _study_conf([item for item in parsed if str(item.key_or_group).startswith(_PREFIX)])
    searched = [item for item in parsed if item.is_sweep_override()]
    if not searched:
        raise ConfigError(
            "sweep: nothing to search; give a setting as KEY=interval(a,b), KEY=range(a,b) or KEY=choice(a,b)"
        )
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
        failed = _search(conf, study, searched, fixed)
        _print_best(conf, study)
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise SweepError(f"{len(failed)} trials failed, the others are done: {reasons}")
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
    for name in conf.objectives:
        figure, _, subnet = name.partition(".")
        if figure not in (_OF_SUBNET if subnet else _OF_RUN):
            known = ", ".join([*(f"{figure}.SUBNET" for figure in _OF_SUBNET), *_OF_RUN])
            raise ConfigError(f"study.objectives: unknown figure {name!r}; known: {known}")
    return conf


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


def _search(conf: StudyConf, study: optuna.Study, searched: Sequence[Override], fixed: Sequence[str]) -> dict[str, str]:
    """Run the trials that are missing; returns the names of those that failed, and why."""
    from optuna.trial import Trial, TrialState

    failed = {}
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
            study.tell(trial, _run_trial(conf, [*fixed, *settings], name))
        except FedofaError as error:
            failed[name] = str(error)
            study.tell(trial, state=TrialState.FAIL)
    return failed


def _sampler(conf: StudyConf, number: int) -> optuna.samplers.BaseSampler:
    from optuna.samplers import TPESampler

    return TPESampler(seed=zlib.crc32(f"{conf.seed}/{number}".encode()))


def _suggest(trial: optuna.Trial, override: Override) -> str:
    """One setting of a trial, as an override."""
    key, sweep = override.get_key_element(), override.value()
    name = key_of(override)
    if isinstance(sweep, IntervalSweep):
        low, high, log = sweep.start, sweep.end, "log" in sweep.tags
        if low is None or high is None or low >= high or (log and low <= 0):
            raise ConfigError(
                f"{name}: expected an interval that rises, and above 0 with the tag log, found {low}, {high}"
            )
        whole = isinstance(low, int) and isinstance(high, int)
        value = trial.suggest_int(name, int(low), int(high), log=log) if whole else None
        return f"{key}={trial.suggest_float(name, low, high, log=log) if value is None else value}"
    if isinstance(sweep, RangeSweep) and isinstance(sweep.start, int) and isinstance(sweep.step, int):
        values = list(sweep.range())
        return f"{key}={trial.suggest_int(name, int(values[0]), int(values[-1]), step=abs(sweep.step))}"
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
    """
    figure, _, subnet = name.partition(".")
    rows = {row["name"]: row for row in summary["subnets"]} if subnet else {"": summary}
    value = rows.get(subnet, {}).get(figure)
    if not isinstance(value, int | float):
        have = f"; its subnets are {', '.join(rows)}" if subnet and subnet not in rows else ""
        raise ConfigError(f"study.objectives: the run has no figure {name!r}{have}")
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
