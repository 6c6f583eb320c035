"""Runs side by side: what is found below a folder, what differs, means over seeds, and the picture."""

import json
import statistics
import struct
from pathlib import Path

import pytest

from fedofa.report.compare_plots import comparison_figure, plot_comparison
from fedofa.report.comparison import build_comparison, differing, find_runs, label_of, seed_groups, spread_of
from fedofa.types.errors import ConfigError

MACS = {"largest": 4e6, "smallest": 4e5, "phone": 2e6}


def write_run(path: Path, *, seed: int, alpha: float = 0.3, lift: float = 0.0, done: bool = True, rounds: int = 8):
    path.mkdir(parents=True)
    final = {name: 0.5 + lift + 0.01 * seed + 0.05 * rank for rank, name in enumerate(("smallest", "phone", "largest"))}
    lines = []
    for number in range(1, rounds + 1):
        scores = {name: {"accuracy": top * number / rounds, "loss": 1.0} for name, top in final.items()}
        scores = scores if number % 2 == 0 else None
        lines.append({"round": number, "scores": scores, "bytes_down": 100, "bytes_up": 50, "wall_seconds": 2.0})
    (path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"seed": seed, "rounds": rounds, "partition": {"alpha": alpha}, "finetune": {"plans": ["full"]}}
    if done:
        mine = {"output_dir": str(path), "runtime": {"num_workers": seed}, "resume": bool(seed)}
        (path / "config.json").write_text(json.dumps({**settings, **mine}))
        subnets = [{"name": name, "accuracy": value, "macs": MACS[name]} for name, value in final.items()]
        totals = {"bytes_down": 100 * rounds, "bytes_up": 50 * rounds, "cpu_seconds": 9.0, "wall_seconds": 2.0 * rounds}
        (path / "summary.json").write_text(json.dumps({"rounds": rounds, "subnets": subnets, **totals}))
    else:
        run = {"seed": seed, "partition.alpha": alpha, "finetune.plans": '["full"]', "uniform": False}
        manifest = path / "checkpoints" / "round-000008" / "checkpoint.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps({"manifest": {"run": run}}))
    return final


@pytest.fixture
def sweep(tmp_path):
    """Two settings of three seeds each, and one run that is not finished; the finished ones' final accuracies."""
    finals = {}
    for alpha, lift in ((0.1, 0.0), (1.0, 0.2)):
        for seed in (0, 1, 2):
            path = tmp_path / "sweep" / f"alpha={alpha},seed={seed}"
            finals[path.name] = write_run(path, seed=seed, alpha=alpha, lift=lift)
            write_run(path / "fedavg_weakest", seed=seed)
    write_run(tmp_path / "sweep" / "alpha=5,seed=0", seed=0, alpha=5.0, lift=0.1, done=False)
    return tmp_path / "sweep", finals


def test_all_runs_below_a_sweeps_folder_are_found_and_no_comparison_run_within_them(sweep):
    folder, finals = sweep
    runs = find_runs([folder])
    assert {run.name for run in runs} == {*finals, "alpha=5,seed=0"}
    assert {run.name: dict(run.accuracy) for run in runs if run.finished} == finals
    assert [run.name for run in runs if not run.finished] == ["alpha=5,seed=0"]


def test_a_folder_asked_for_twice_is_one_run_and_equal_names_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        write_run(tmp_path / parent / "run", seed=0)
    assert len(find_runs([tmp_path / "a", tmp_path / "a" / "run"])) == 1
    names = {run.name for run in find_runs([tmp_path / "a", tmp_path / "b"])}
    assert names == {str((tmp_path / parent / "run").resolve()) for parent in ("a", "b")}


def test_only_settings_that_matter_and_differ_are_named_the_seed_last(sweep):
    runs = find_runs([sweep[0]])
    assert differing(runs) == ["partition.alpha", "seed"]
    assert label_of(runs[0], differing(runs)) == "alpha=0.1, seed=0"


def test_an_unfinished_run_shows_its_last_evaluation_and_the_settings_of_its_checkpoint(sweep):
    (run,) = [run for run in find_runs([sweep[0]]) if not run.finished]
    assert run.settings["partition.alpha"] == 5.0
    assert run.accuracy["largest"] == pytest.approx(0.7)
    assert run.totals["bytes_down"] == 800
    assert "cpu_seconds" not in run.totals


def test_a_run_that_went_on_after_its_summary_is_unfinished(tmp_path):
    write_run(tmp_path / "run", seed=0)
    with (tmp_path / "run" / "rounds.jsonl").open("a") as log:
        log.write(json.dumps({"round": 9, "bytes_down": 1, "bytes_up": 1, "wall_seconds": 1, "scores": None}) + "\n")
    (run,) = find_runs([tmp_path / "run"])
    assert not run.finished


def test_mean_and_spread_over_seeds(sweep):
    folder, finals = sweep
    groups = seed_groups(find_runs([folder]))
    assert [len(group) for group in groups] == [3, 3]
    values = [finals[f"alpha=1.0,seed={seed}"]["phone"] for seed in (0, 1, 2)]
    assert spread_of(groups[1])["phone"] == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    content = json.loads(json.dumps(build_comparison(find_runs([folder]))))
    assert content["differing"] == ["partition.alpha", "seed"]
    assert len(content["runs"]) == 7
    assert content["over_seeds"][1]["settings"] == {"partition.alpha": 1.0}
    assert content["over_seeds"][1]["accuracy"]["phone"]["mean"] == pytest.approx(statistics.mean(values))


def test_runs_without_a_second_seed_have_no_spread(tmp_path):
    write_run(tmp_path / "a", seed=0, alpha=0.1)
    write_run(tmp_path / "b", seed=1, alpha=1.0)
    assert seed_groups(find_runs([tmp_path])) == []


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_without_a_run_is_refused_by_name(tmp_path, name):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run", seed=0)
    with pytest.raises(ConfigError, match=name):
        find_runs([tmp_path / "run", tmp_path / name])


def test_a_damaged_run_is_refused_by_name(tmp_path):
    write_run(tmp_path / "run", seed=0)
    (tmp_path / "run" / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match="run: the run cannot be read"):
        find_runs([tmp_path / "run"])


def test_the_picture_shows_a_mean_for_each_setting_and_marks_the_unfinished_run(sweep, tmp_path):
    runs = find_runs([sweep[0]])
    figure = comparison_figure(runs)
    largest, lowest, by_macs = figure.axes
    texts = {" ".join(text.get_text().split()) for text in largest.texts}
    assert texts == {"alpha=0.1, 3 seeds 61.0 %", "alpha=1, 3 seeds 81.0 %", "alpha=5, seed=0 (unfinished) 70.0 %"}
    assert len(largest.lines) == 3 + 3 + 2 + 1
    assert len(by_macs.lines) == 2, "an unfinished run has no compute to show"
    ends = {round(line.get_ydata()[-1], 3) for line in lowest.lines}
    assert 56.0 in ends, "the mean of the phones at alpha 0.1"
    plot_comparison(runs, tmp_path / "comparison.png")
    data = (tmp_path / "comparison.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24])[0] > 1000
    assert not list(tmp_path.glob(".comparison*"))


def test_one_run_alone_is_drawn_under_its_name(tmp_path):
    write_run(tmp_path / "run", seed=0)
    (label,) = comparison_figure(find_runs([tmp_path / "run"])).axes[0].texts
    assert label.get_text().startswith("run ")


def test_runs_that_were_not_evaluated_have_no_picture(tmp_path):
    write_run(tmp_path / "run", seed=0, done=False, rounds=1)
    with pytest.raises(ConfigError, match="no run was evaluated"):
        plot_comparison(find_runs([tmp_path / "run"]), tmp_path / "comparison.png")
