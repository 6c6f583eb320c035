"""Every preset under conf/experiment composes, means what it says, and gives way to settings beside it."""

from importlib.resources import files
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from conf.compose import compose_conf
from fedofa.types.errors import ConfigError

FOLDER = Path(str(files("conf"))) / "experiment"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def values(node: dict, prefix: str = ""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from values(value, f"{prefix}{key}.")
        elif key != "defaults":
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_composes_and_every_value_in_it_takes_effect(name):
    given = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    found = OmegaConf.structured(compose_conf([f"+experiment={name}"]))
    for key, value in values(given):
        assert OmegaConf.select(found, key) == value, key
    for entry in given.get("defaults", []):
        ((group, option),) = entry.items()
        group = group.removeprefix("override /")
        alone = OmegaConf.to_container(OmegaConf.structured(compose_conf([f"{group}={option}"])))[group]
        changed = {key for key, _ in values({group: given.get(group, {})})}
        for key, value in values({group: alone}):
            if key not in changed:
                assert OmegaConf.select(found, key) == value, key


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_explained_and_has_a_folder_of_its_own(name):
    first, second = (FOLDER / f"{name}.yaml").read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert second.startswith("# ")
    assert compose_conf([f"+experiment={name}"]).output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", PRESETS)
def test_a_setting_beside_a_preset_has_the_last_word(name):
    assert compose_conf(["rounds=7", "partition=iid", f"+experiment={name}"]).rounds == 7
    assert compose_conf([f"+experiment={name}", "fleet.round_seconds=11"]).fleet.round_seconds == 11


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ConfigError) as caught:
        compose_conf(["+experiment=nope"])
    assert str(caught.value) == f"experiment/nope: no such option; available: {', '.join(PRESETS)}"
