"""Sweeps as Hydra sees them: which combinations there are, and how their folders are named."""

from pathlib import Path

import pytest

from conf.multirun import multirun, num_parallel_runs, run_name, sweep_dir
from fedofa.types.errors import ConfigError


def record(composed, folder: Path) -> tuple[str, int, str, int]:
    return folder.name, composed.seed, composed.finetune.plans[0], num_parallel_runs()


def test_every_combination_runs_once_in_a_folder_that_names_it(tmp_path):
    found = multirun(["seed=0,1", "finetune=full,bias", f"hydra.sweep.dir={tmp_path}"], record)
    assert sorted(found) == [
        ("finetune=bias,seed=0", 0, "bias", 1),
        ("finetune=bias,seed=1", 1, "bias", 1),
        ("finetune=full,seed=0", 0, "full", 1),
        ("finetune=full,seed=1", 1, "full", 1),
    ]
    assert [item.name for item in tmp_path.iterdir()] == ["multirun.yaml"], "no folders by job number"


def test_ranges_and_globs_over_groups(tmp_path):
    found = multirun(["seed=range(0,6,step=3)", "finetune=glob([h*,b*])", f"hydra.sweep.dir={tmp_path}"], record)
    assert sorted((seed, plan) for _, seed, plan, _ in found) == [(0, "bias"), (0, "head"), (3, "bias"), (3, "head")]


def test_joblib_runs_them_in_other_processes_that_know_how_many_they_are(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the extra `sweeps` is not installed")
    settings = ["seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path}"]
    assert multirun(settings, record) == [("seed=0", 0, "full", 2), ("seed=1", 1, "full", 2)]


def test_a_name_does_not_depend_on_order_or_on_what_changes_no_result():
    name = run_name(["seed=1", "finetune=bias"], ["seed", "finetune"])
    assert name == "finetune=bias,seed=1"
    more = ["finetune=bias", "runtime.num_workers=1", "hydra/launcher=joblib", "data.path=/x", "resume=true", "seed=1"]
    assert run_name(more, ["finetune", "seed"]) == name


def test_settings_that_are_not_swept_are_in_the_digest():
    one, other = (run_name(["seed=1", f"rounds={rounds}"], ["seed"]) for rounds in (5, 6))
    assert one != other
    assert one.startswith("seed=1-")
    assert run_name(["rounds=5", "seed=1"], ["seed"]) == one


def test_names_are_safe_for_files_and_stay_distinct():
    names = {run_name([f"finetune.plans=[full,'last_blocks({k})']"], ["finetune.plans"]) for k in (1, 2)}
    assert len(names) == 2
    assert all(set("/()[]'\" ").isdisjoint(name) for name in names)
    long = {run_name([f"output=x{'y' * 300}{k}"], ["output"]) for k in (1, 2)}
    assert len(long) == 2
    assert max(map(len, long)) < 150


def test_a_preset_is_named_like_any_setting():
    assert run_name(["+experiment=smoke", "++seed=3"], ["experiment", "seed"]) == "experiment=smoke,seed=3"


def test_the_sweeps_folder_is_named_after_what_is_swept():
    assert sweep_dir(["seed=0,1", "rounds=3", "partition.alpha=0.1,1.0"]) == Path("runs/sweeps/partition.alpha+seed")
    assert sweep_dir(["seed=0,1", "hydra.sweep.dir=runs/mine"]) == Path("runs/mine")
    assert sweep_dir(["seed=0"]) == Path("runs/sweeps/sweep")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sed=0,1"], "sed: unknown setting; did you mean 'seed'?"),
        (["finetune=full,nope"], "finetune/nope: no such option; available: auto, bias, full, head, last_blocks"),
        (["finetune.learning_rate=interval(0,1)"], "finetune.learning_rate: an interval has no end of values"),
        (["seed=0,1", "output_dir=x"], "output_dir: in a sweep every run has its own folder"),
        (["seed=0,1", "hydra/launcher=nope"], "hydra/launcher/nope: no such option; available: "),
        (["seed=range(0"], "'seed=range(0' is no setting: "),
    ],
)
def test_what_cannot_be_swept_is_one_line_before_anything_runs(tmp_path, overrides, message):
    ran = []
    where = [] if any("output_dir" in item for item in overrides) else [f"hydra.sweep.dir={tmp_path}"]
    with pytest.raises(ConfigError) as caught:
        multirun([*overrides, *where], lambda composed, folder: ran.append(folder))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not ran
