"""The figures that a study optimises, and how the runs of a sweep share the cores."""

from pathlib import Path

import pytest

from conf.compose import compose_conf
from fedofa.types.errors import ConfigError
from server import sweeps
from server.study import figure_of
from server.sweeps import for_sweep, is_done

SUMMARY = {"bytes_up": 10, "subnets": [{"name": "largest", "accuracy": 0.5, "client_test_accuracy": None}]}


def test_figures_are_read_by_name():
    assert figure_of(SUMMARY, "bytes_up") == 10.0
    assert figure_of(SUMMARY, "accuracy.largest") == 0.5


@pytest.mark.parametrize("name", ["accuracy.phone", "client_test_accuracy.largest", "cpu_seconds"])
def test_a_figure_that_the_run_does_not_have_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=name):
        figure_of(SUMMARY, name)


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
