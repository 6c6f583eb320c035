"""Benchmarks that go on with what is there: only with runs of their own settings, and with all that they were asked."""

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of that folder by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    return import_module


@pytest.fixture
def accuracy(benchmark, monkeypatch, tmp_path):
    """Call `finetune_accuracy` in a folder; returns the studies that were let through, whose rows are not run."""
    script, studies = benchmark("finetune_accuracy"), []
    monkeypatch.setattr(script.Study, "best", lambda study, row: studies.append(study))
    monkeypatch.setattr(script, "draw", lambda rows, path: None)
    monkeypatch.setattr(script, "print_table", lambda rows: None)

    def run(*options: str) -> list:
        monkeypatch.setattr(sys, "argv", ["finetune_accuracy.py", "--folder", str(tmp_path / "study"), *options])
        script.main()
        return studies

    return run


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--rounds", "5"], "{'rounds': (30, 5)}"),
        (["--cohort", "2"], "{'cohort': (4, 2)}"),
        (["--steps", "1"], "{'finetune.max_steps': ('10', '1')}"),
        (["--test-examples", "1000"], "{'data.test_examples': ('10000', '1000')}"),
        (["--seed", "7"], "{'seed': ('0', '7')}"),
    ],
)
def test_runs_of_other_settings_are_not_taken_for_the_studys(accuracy, tmp_path, options, difference):
    accuracy("--rows", "head")
    with pytest.raises(SystemExit) as refused:
        accuracy("--rows", "head", *options)
    assert str(refused.value) == (
        f"{tmp_path / 'study'}: made with other settings (then, now): {difference}; give another --folder"
    )
    assert len(accuracy("--rows", "bias", "--workers", "3", "--data-path", "elsewhere.npz")) == 2, "the same results"


def test_runs_of_a_recipe_that_the_script_had_before_are_refused(accuracy, benchmark, monkeypatch):
    accuracy("--rows", "head")
    monkeypatch.setattr(benchmark("finetune_accuracy"), "_HEAD_RATE", 2e-3)
    with pytest.raises(SystemExit, match=r"\(then, now\): {'head_rate': \(0.001, 0.002\)}; give another --folder"):
        accuracy("--rows", "head")


def test_runs_of_unknown_settings_are_refused(accuracy, tmp_path):
    (tmp_path / "study/start").mkdir(parents=True)
    (tmp_path / "study/start/summary.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"holds runs, but no study\.json with their settings; give another --folder"):
        accuracy("--rows", "head")
    assert not (tmp_path / "study/study.json").exists()


def test_the_predictor_gets_every_setting_of_the_supernet(benchmark, monkeypatch, tmp_path):
    truth, given = benchmark("truth"), []

    def run_predictor(conf):
        given.append(conf)
        return SimpleNamespace(rank_correlation=0.5, num_held_out=4)

    monkeypatch.setattr(truth, "run_predictor", run_predictor)
    overrides = ["supernet=small", "supernet.resolutions=[16,20]", "++supernet.dropout=0.5", "in_channels=1"]
    assert truth.accuracy_rank(tmp_path / "pairs.jsonl", tmp_path, [*overrides, "num_classes=7", "passes=3"]) == 0.5
    (conf,) = given
    assert (conf.supernet["resolutions"], conf.supernet["dropout"]) == ([16, 20], 0.5)
    assert (conf.in_channels, conf.num_classes, conf.pairs) == (1, 7, str(tmp_path / "pairs.jsonl"))
