"""What a study searches and optimises, what becomes of trials that fail, and how runs of a sweep share the cores."""

import math
from pathlib import Path

import pytest

from conf.compose import compose_conf
from fedofa.types.errors import ConfigError, DivergenceError, SweepError
from server import study, sweeps
from server.study import STUDY_FILE, figure_of, run_study
from server.sweeps import for_sweep, is_done

SUMMARY = {"bytes_up": 10, "subnets": [{"name": "largest", "accuracy": 0.5, "client_test_accuracy": None}]}


def test_figures_are_read_by_name():
    assert figure_of(SUMMARY, "bytes_up") == 10.0
    assert figure_of(SUMMARY, "accuracy.largest") == 0.5


@pytest.mark.parametrize("name", ["accuracy.phone", "client_test_accuracy.largest", "cpu_seconds"])
def test_a_figure_that_the_run_does_not_have_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=name):
        figure_of(SUMMARY, name)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_refused_by_name(value):
    with pytest.raises(DivergenceError, match="expected a finite accuracy.largest, found"):
        figure_of({"subnets": [{"name": "largest", "accuracy": value}]}, "accuracy.largest")


@pytest.fixture
def tried(monkeypatch, tmp_path):
    """Studies go below a temporary folder, and a trial gives the figure, or raises the error, of its seed.

    Each entry of the list is the run name of a trial, in the order in which they ran.
    """
    pytest.importorskip("optuna", reason="the extra `sweeps` is not installed")
    monkeypatch.chdir(tmp_path)
    names: list[str] = []
    outcomes: dict[str, list[float] | Exception] = {}

    def run_trial(conf, settings, name):
        names.append(name)
        outcome = outcomes.get(name, [0.5])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(study, "_run_trial", run_trial)
    return names, outcomes


SEARCH = ("seed=range(0,1000)", "study.trials=4")


@pytest.mark.parametrize(
    "error", [DivergenceError("the loss is nan"), ZeroDivisionError("a fault")], ids=["named", "unforeseen"]
)
def test_a_failed_trial_is_told_and_run_again_by_every_call_until_it_is_done(error, tried, capsys):
    names, outcomes = tried
    run_study(["study.name=sound", *SEARCH])
    sound = names.copy()
    names.clear()

    outcomes[sound[1]] = error
    with pytest.raises(SweepError, match=rf"1 of 4 trials failed; .* study.trials=4 or more; .*{sound[1]}: .*"):
        run_study(SEARCH)
    assert names == sound, "the trials after it ran, with the settings that they would have had"
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, ZeroDivisionError)

    names.clear()
    with pytest.raises(SweepError, match=str(error)):
        run_study(SEARCH)
    assert names == [sound[1]], "only what failed runs again"
    with pytest.raises(SweepError, match=sound[1]):
        run_study([*SEARCH[:1], "study.trials=1"])

    names.clear()
    outcomes.clear()
    run_study(SEARCH)
    assert names == [sound[1]]
    names.clear()
    run_study(SEARCH)
    assert names == []


@pytest.mark.parametrize(
    "search",
    [
        "seed=range(1,1)",
        "seed=range(1,5,-1)",
        "seed=range(1,5,0)",
        "seed=range(0,inf)",
        "seed=shuffle(range(1,5))",
        "seed=interval(3,3)",
        "seed=interval(5,3)",
        "seed=interval(0.0,inf)",
        "seed=interval(nan,1.0)",
        "seed=tag(log,interval(0,3))",
        "seed=tag(log,interval(-1,3))",
        "seed=shuffle(choice(1,2))",
        "seed=glob(*)",
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_stored(search, tried, tmp_path):
    names, _ = tried
    with pytest.raises(ConfigError, match="^seed: expected "):
        run_study([search, "study.trials=1"])
    assert not any(tmp_path.iterdir())
    run_study(["seed=range(1,5)", "study.trials=1"])
    assert len(names) == 1


def test_a_setting_is_searched_once(tried):
    with pytest.raises(ConfigError, match="^seed: expected one range, interval or choice, found 2"):
        run_study(["seed=range(1,5)", "+seed=1,2"])


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ("seed=range(5,1,-2)", {"3", "5"}),
        ("seed=range(0,9,4)", {"0", "4", "8"}),
        ("server.learning_rate=range(0.5,1.1,0.25)", {"0.5", "0.75", "1.0"}),
        ("seed=int(interval(1,2))", {"1", "2"}),
        ("seed=tag(log,int(interval(1,2)))", {"1", "2"}),
        ("finetune=choice(full,bias)", {"full", "bias"}),
    ],
)
def test_the_values_of_a_search_are_those_of_the_override(search, expected, tried):
    names, _ = tried
    run_study([search, "study.trials=20"])
    assert {name.partition("=")[2] for name in names} == expected


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/b", "/tmp/x", ".", ".x", "a b", "-x", "''", "a?mode=memory", "x" * 101]
)
def test_a_study_stays_below_the_folder_of_studies(name, tried, tmp_path):
    with pytest.raises(ConfigError, match="^study.name: expected the name of a folder"):
        run_study([*SEARCH, f"study.name={name}" if name == "''" else f"study.name='{name}'"])
    assert not any(tmp_path.iterdir())


def test_the_folder_of_a_study_has_its_name(tried):
    folder = run_study(["study.name='lr_2.b+c=1,d-e'", *SEARCH])
    assert folder == Path("runs/studies/lr_2.b+c=1,d-e")
    assert (folder / STUDY_FILE).is_file()


def test_runs_side_by_side_share_the_cores(monkeypatch):
    monkeypatch.setattr(sweeps, "available_cores", lambda: 8)
    conf = compose_conf()
    shares = [for_sweep(conf, Path("x"), together).runtime.num_workers for together in (1, 3, 8, 20)]
    assert shares == [8, 2, 1, 1]
    asked = compose_conf(["runtime.num_workers=5"])
    assert for_sweep(asked, Path("x"), 8).runtime.num_workers == 5


def test_a_run_of_a_sweep_resumes_in_its_own_folder(tmp_path):
    conf = for_sweep(compose_conf(["resume_round=3", "resume=true"]), tmp_path / "run", 1)
    assert (conf.output_dir, conf.resume, conf.resume_round) == (str(tmp_path / "run"), True, None)
    assert not is_done(conf)
