"""Levers of a plan through the command line: one result with any number of workers, and refusals in time."""

import pytest

from conf.compose import compose_conf
from fedofa.types.errors import ConfigError
from server.federation import build_parts

QUICK = ("evaluation.comparison=false", "evaluation.clients=false", "finetune.epochs=2")
CACHED = ("finetune=last_blocks", "finetune.lean=true", "finetune.feature_cache=true", "finetune.max_shift=0")


@pytest.mark.slow
def test_cached_features_give_the_same_bits_with_any_number_of_workers(simulate, tmp_path):
    more = (*CACHED, *QUICK, "rounds=2")
    one = simulate(tmp_path / "one", *more, "runtime.num_workers=1")
    assert one["num_failures"] == 0
    assert one["shared_digest"] == simulate(tmp_path / "two", *more, "runtime.num_workers=2")["shared_digest"]


def test_cached_features_of_shifted_images_are_refused_before_a_run(overrides, tmp_path):
    conf = compose_conf(overrides(tmp_path, *CACHED[:3], "finetune.max_shift=1"))
    with pytest.raises(ConfigError, match=r"finetune.feature_cache: .* set finetune.max_shift=0 .*; found max_shift=1"):
        build_parts(conf)
