"""Composing settings: every option, every misspelling, and the way there and back."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from conf.compose import (
    MAX_SEED,
    compose_conf,
    compose_predictor_conf,
    compose_profile_conf,
    compose_search_conf,
    compose_shrink_conf,
    encode_conf,
    known_keys,
    load_conf,
)
from conf.schema import (
    SOURCES,
    BlockConf,
    DeviceClassConf,
    MobileNetV3Conf,
    PredictorConf,
    ProfileConf,
    ResidualStageConf,
    SearchConf,
    ShrinkConf,
    SimulateConf,
    StageConf,
)
from fedofa.supernet.families import build_supernet
from fedofa.supernet.published import PUBLISHED
from fedofa.supernet.ready_made import READY_MADE
from fedofa.types.errors import ConfigError
from server.cli import USAGE

ROOT = Path(str(files("conf")))
YAML = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.yaml") if path.parent.name != "experiment")
OPTIONS = [(path.parent.name, path.stem) for path in YAML if path.parent.name]
GROUPS = ("aggregation", "data", "finetune", "fleet", "partition", "runtime", "shrinking", "supernet", "tracking")
OF_SHRINK = ("data", "optimiser", "shrinking", "supernet")
OF_SEARCH = ("chip", "supernet")
SCHEMAS = {
    "shrink": ShrinkConf,
    "optimiser": ShrinkConf,
    "profile": ProfileConf,
    "predictor": PredictorConf,
    "search": SearchConf,
    "chip": SearchConf,
}
"""Of the files and groups that are not simulate's."""


def composed(group: str, *overrides: str) -> DictConfig:
    """The settings of a command that has the group."""
    if group == "chip":
        conf = compose_search_conf(["device=any", *overrides])
    else:
        conf = compose_conf(overrides) if group in GROUPS else compose_shrink_conf(overrides)
    return OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(conf)))


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_conf(overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_defaults_compose():
    conf = compose_conf()
    assert isinstance(conf, SimulateConf)
    assert (conf.rounds, conf.data.name, conf.partition.kind) == (400, "mnist5k", "dirichlet")
    assert conf.supernet["family"] == "mobilenet_v3"
    assert conf.fleet.classes["phone"].uplink_bytes_per_second == 8e3
    assert conf.resume_round is None


def test_every_group_has_options():
    assert {group for group, _ in OPTIONS} == {*GROUPS, *OF_SHRINK, *OF_SEARCH}


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=str)
def test_every_option_composes_and_takes_effect(group, name):
    given = OmegaConf.load(ROOT / group / f"{name}.yaml")
    asked = [f"{group}.{key}=null" for key in given if OmegaConf.is_missing(given, key)]
    found = composed(group, f"{group}={name}", *asked)
    if "blocks" in given:
        given.blocks = [OmegaConf.to_container(OmegaConf.merge(BlockConf, block)) for block in given.blocks]
    for key, value in leaves(OmegaConf.to_container(given), package(Path(group) / f"{name}.yaml")):
        if "${" not in str(value) and value != "???" and key != "shrinking.steps":  # as many as rounds
            assert OmegaConf.select(found, key) == value, key


def package(path: Path) -> str:
    """What the keys of a file begin with: its group, unless it says that they are whole."""
    is_global = (ROOT / path).read_text().startswith("# @package _global_")
    return f"{path.parent.name}." if path.parent.name and not is_global else ""


def leaves(value: dict, prefix: str) -> list[tuple[str, object]]:
    """Dotted keys and values of a file, its list of defaults left out."""
    pairs = []
    for key, item in value.items():
        if key != "defaults":
            pairs += leaves(item, f"{prefix}{key}.") if isinstance(item, dict) else [(f"{prefix}{key}", item)]
    return pairs


@pytest.mark.parametrize("path", YAML, ids=str)
def test_every_key_of_every_file_is_in_the_schema(path):
    known = known_keys(SCHEMAS.get(path.parent.name or path.stem, SimulateConf))
    unknown = sorted(set(dotted(OmegaConf.load(ROOT / path), package(path))) - known)
    assert not unknown


def dotted(node: DictConfig | ListConfig, prefix: str) -> list[str]:
    """The dotted keys of a file; stages and device classes are held against their own schemas here."""
    keys = []
    for key, value in node._content.items():
        name = f"{prefix}{key}"
        if name.split(".", maxsplit=1)[0] in ("defaults", "hydra") or name.endswith(".defaults"):
            continue
        keys.append(name)
        if name == "supernet.stages":
            schemas = [set(schema.__dataclass_fields__) for schema in (StageConf, ResidualStageConf)]
            assert all(set(stage) in schemas for stage in value)
        elif name == "fleet.classes":
            assert all(set(entry) == set(DeviceClassConf.__dataclass_fields__) for entry in value.values())
        elif isinstance(value, DictConfig):
            keys += dotted(value, f"{name}.")
    return keys


def test_every_setting_of_the_schema_has_a_value():
    given = set()
    for overrides in ([], *([f"data={name}"] for name in SOURCES)):
        container = OmegaConf.to_container(OmegaConf.structured(compose_conf(overrides)), throw_on_missing=True)
        given |= set(flat(container, ""))
    others = {key for key in known_keys() if key.startswith("supernet.")} - {
        f"supernet.{name}" for name in MobileNetV3Conf.__dataclass_fields__
    }
    assert known_keys() - {key.rpartition(".")[0] for key in known_keys()} - others <= given


def flat(value: dict, prefix: str) -> list[str]:
    keys = []
    for key, item in value.items():
        keys += [f"{prefix}{key}", *(flat(item, f"{prefix}{key}.") if isinstance(item, dict) else [])]
    return keys


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ruonds=3", "ruonds: unknown setting; did you mean 'rounds'?"),
        ("finetune.learnig_rate=1", "finetune.learnig_rate: unknown setting; did you mean 'finetune.learning_rate'?"),
        ("supernet.norms=batch", "supernet.norms: unknown setting; did you mean 'supernet.norm'?"),
        ("+rouds=3", "rouds: unknown setting; did you mean 'rounds'?"),
        ("+supernet.dropuot=0.1", "supernet.dropuot: unknown setting; did you mean 'supernet.dropout'?"),
        ("+supernet.pretrained=true", "supernet.pretrained: unknown setting; supernet of another kind has it"),
        ("+zzz=3", "zzz: unknown setting; `fedofa settings` prints all of them"),
        ("data.window_samples=5", "data.window_samples: unknown setting; data of another kind has it"),
        ("partitoin=iid", "partitoin: unknown setting; did you mean 'partition'?"),
    ],
)
def test_a_misspelt_key_or_group_is_named_with_a_suggestion(override, message):
    assert refused(override) == message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rounds=x", ["rounds: ", "'x'", "Integer"]),
        ("rounds=1.5", ["rounds: ", "'1.5'", "Integer"]),
        ("finetune.learning_rate=fast", ["finetune.learning_rate: ", "'fast'", "Float"]),
        ("resume=maybe", ["resume: ", "'maybe'", "bool"]),
        ("supernet.stem_width=wide", ["supernet.stem_width: ", "'wide'", "Integer"]),
        ("supernet.kernels=[a]", ["supernet.kernels[0]: ", "'a'", "Integer"]),
        ("finetune.plans=full", ["finetune.plans: ", "list"]),
        ("fleet.classes.phone=3", ["fleet.classes.phone: ", "DeviceClassConf"]),
        ("data.calibration_examples=null", ["data.calibration_examples: ", "None"]),
        ("data.path=${nope}", ["data.path: ", "nope"]),
    ],
)
def test_a_value_of_the_wrong_type_is_named_by_its_key(override, parts):
    message = refused(override)
    assert message.startswith(parts[0])
    for part in parts:
        assert part in message


def test_a_data_set_brings_its_partition_and_fleet_and_overrides_come_after():
    conf = compose_conf(["data=har"])
    assert (conf.partition.kind, conf.fleet.num_clients, conf.data.test_examples) == ("natural", 18, None)
    conf = compose_conf(["data=har", "partition=iid", "fleet.num_clients=5", "rounds=3", "data.held_out=[2]"])
    assert (conf.partition.kind, conf.fleet.num_clients, conf.rounds) == ("iid", 5, 3)
    assert load_conf({"config": encode_conf(conf)}) == conf
    assert isinstance(conf.data, SOURCES["har"])


@pytest.mark.parametrize("group", GROUPS)
def test_an_unknown_option_lists_the_groups_options(group):
    options = ", ".join(sorted(name for other, name in OPTIONS if other == group))
    assert refused(f"{group}=nope") == f"{group}/nope: no such option; available: {options}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "supernet.family=resnext",
            "supernet.family: expected one of ['chain', 'fixed', 'mobilenet_v3', 'proxyless', 'resnet'], "
            "found 'resnext'",
        ),
        ("~rounds", "settings without a value: rounds; give them as key=value"),
        ("seed=???", "settings without a value: seed; give them as key=value"),
        ("~supernet.norm", "settings without a value: supernet.norm; give them as key=value"),
    ],
)
def test_what_is_missing_is_named(override, message):
    assert refused(override) == message


def test_a_new_device_class_needs_all_its_budgets():
    message = refused("+fleet.classes.tablet.share=0.5", "+fleet.classes.tablet.memory_bytes=1e9")
    for name in ("macs_per_second", "uplink_bytes_per_second", "downlink_bytes_per_second"):
        assert f"fleet.classes.tablet.{name}" in message
    assert "tablet.share" not in message


@pytest.mark.parametrize("overrides", [[], ["supernet=fixed"], ["supernet=published", "data=cifar10", "rounds=7"]])
def test_settings_travel_as_json(overrides):
    conf = compose_conf(overrides)
    text = encode_conf(conf)
    assert load_conf({"config": text}) == conf
    assert encode_conf(load_conf({"config": text})) == text


def test_settings_travel_as_one_string_of_overrides():
    text = "rounds=7 data=cifar10 output_dir='runs/a b' finetune.plans='[full,\"last_blocks(2)\"]'"
    conf = load_conf({"overrides": text})
    assert conf == compose_conf(
        ["rounds=7", "data=cifar10", "output_dir=runs/a b", 'finetune.plans=[full,"last_blocks(2)"]']
    )
    assert (conf.rounds, conf.output_dir, conf.finetune.plans) == (7, "runs/a b", ["full", "last_blocks(2)"])
    assert load_conf({}) == compose_conf()


def test_the_configuration_has_precedence_over_overrides():
    text = encode_conf(compose_conf(["rounds=3"]))
    assert load_conf({"config": text, "overrides": "rounds=4"}).rounds == 3


def test_a_travelled_configuration_is_checked_again():
    text = encode_conf(compose_conf()).replace('"rounds": 400', '"rounds": "many"')
    with pytest.raises(ConfigError, match="rounds: Value 'many'"):
        load_conf({"config": text})


def test_a_change_to_a_loaded_configuration_stays_with_its_owner():
    first = load_conf({"overrides": "rounds=31"})
    first.rounds = 32
    assert load_conf({"overrides": "rounds=31"}).rounds == 31


@pytest.mark.parametrize("run_config", [{"config": "{"}, {"config": "3"}, {"overrides": "rounds='3"}])
def test_a_run_config_that_cannot_be_read_is_refused(run_config):
    with pytest.raises(ConfigError):
        load_conf(run_config)


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("published", "ofa_mbv3_d234_e346_k357_w1.0"),
        ("mobilenet_v3_w1.2", "ofa_mbv3_d234_e346_k357_w1.2"),
        ("proxyless", "ofa_proxyless_d234_e346_k357_w1.3"),
        ("resnet50", "ofa_supernet_resnet50"),
    ],
)
def test_the_presets_of_published_spaces_build_them(preset, name):
    settings = compose_conf([f"supernet={preset}"]).supernet
    supernet = build_supernet({**settings, "in_channels": 3, "num_classes": 1000})
    assert supernet.spec == PUBLISHED[name]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", READY_MADE)
def test_the_presets_of_pretrained_networks_describe_them(name):
    settings = compose_conf([f"supernet={name}", "supernet.pretrained=timm:some.tag_in1k"]).supernet
    assert settings.pop("pretrained") == "timm:some.tag_in1k"
    assert build_supernet(settings).spec == READY_MADE[name]  # type: ignore[attr-defined]


def test_where_pretrained_weights_come_from_is_said_or_asked_for():
    assert compose_conf(["supernet=efficientnet_lite0"]).supernet["pretrained"] is True
    assert refused("supernet=mobilenet_v2") == ("settings without a value: supernet.pretrained; give them as key=value")


def test_where_weights_come_from_is_not_asked_for_where_none_are_needed():
    assert compose_search_conf(["supernet=mobilenet_v2", "device=any"]).supernet["pretrained"] is None


def test_the_settings_of_shrink_compose_and_name_their_own_keys():
    conf = compose_shrink_conf(["shrinking=attentive", "supernet.norm=batch", "shrinking.candidates=5"])
    assert isinstance(conf, ShrinkConf)
    assert (conf.shrinking.schedule, conf.shrinking.candidates, conf.supernet["norm"]) == ("attentive", 5, "batch")
    assert (conf.shrinking.teacher_loss.kind, conf.shrinking.teacher_loss.max_ratio) == ("alpha_divergence", 5.0)
    assert compose_shrink_conf().shrinking.schedule == "sandwich"
    for override, message in [
        ("shrinking.candidats=2", "shrinking.candidats: unknown setting; did you mean 'shrinking.candidates'?"),
        ("fleet.zzz=3", "fleet: unknown setting; `fedofa settings shrink` prints all of them"),
        ("shrinking=fast", "shrinking/fast: no such option; available: attentive, none, progressive, sandwich, turns"),
        ("shrinking.steps=many", "shrinking.steps: Value 'many'"),
        ("optimiser=adam", "optimiser/adam: no such option; available: adamw, sgd"),
        ("optimiser=null", "a group (data, supernet, shrinking, optimiser) needs a name"),
    ]:
        with pytest.raises(ConfigError) as caught:
            compose_shrink_conf([override])
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", sorted(name for group, name in OPTIONS if group == "data"))
def test_shrink_composes_with_every_data_set(name):
    conf = compose_shrink_conf([f"data={name}"])
    assert conf.data == compose_conf([f"data={name}"]).data


@pytest.mark.parametrize(
    "override", ["rounds=5", "fleet.num_clients=3", "finetune.max_gradient_norm=2", "++evaluation.every=2"]
)
@pytest.mark.parametrize("data", ["har", "mnist5k"])
def test_shrink_refuses_what_it_does_not_read_though_a_data_set_or_a_schedule_states_it(data, override):
    name = override.lstrip("+").split("=")[0].split(".")[0]
    with pytest.raises(ConfigError, match=f"^{name}: unknown setting; "):
        compose_shrink_conf([f"data={data}", override])


OF_SIMULATE = "data, partition, fleet, supernet, finetune, aggregation, shrinking, runtime, tracking"


@pytest.mark.parametrize(
    ("compose", "override", "message"),
    [
        (compose_conf, "optimiser=adamw", f"optimiser: no such group here; groups: {OF_SIMULATE}"),
        (compose_conf, "chip=eyeriss", "chip: did you mean chip@assignment.chip?"),
        (
            compose_shrink_conf,
            "partition=iid",
            "partition: no such group here; groups: data, supernet, shrinking, optimiser",
        ),
        (compose_shrink_conf, "+experiment=smoke", "experiment: no such group here; groups: data, "),
        (compose_shrink_conf, "optimizer=adamw", "optimizer: unknown setting; did you mean 'optimiser'?"),
        (compose_search_conf, "data=har", "data: no such group here; groups: chip, supernet"),
        (compose_predictor_conf, "optimiser=adamw", "optimiser: no such group here; groups: supernet"),
    ],
)
def test_a_group_of_another_command_is_named_beside_those_there_are(compose, override, message):
    with pytest.raises(ConfigError) as caught:
        compose([override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_usage_names_the_groups():
    text = " ".join(USAGE.split())
    assert f"groups ({OF_SIMULATE}; for shrink data, supernet, shrinking, optimiser) take" in text
    assert {*OF_SIMULATE.split(", ")} == {*GROUPS}


@pytest.mark.parametrize(
    ("compose", "needed"),
    [
        (compose_conf, []),
        (compose_shrink_conf, []),
        (compose_profile_conf, ["output=any"]),
        (compose_predictor_conf, ["pairs=any"]),
        (compose_search_conf, ["device=any"]),
    ],
)
def test_every_commands_seed_is_one_that_torch_takes(compose, needed):
    assert compose([*needed, f"seed={MAX_SEED}"]).seed == torch.Generator().manual_seed(MAX_SEED).initial_seed()
    for seed in (-1, MAX_SEED + 1, 2**64):
        with pytest.raises(ConfigError, match=f"^seed: expected a whole number from 0 to {MAX_SEED}, found {seed}; "):
            compose([*needed, f"seed={seed}"])


def test_a_schedule_has_the_length_of_its_own_where_one_machine_trains_and_the_runs_where_a_fleet_does():
    assert compose_shrink_conf(["shrinking=progressive"]).shrinking.steps == 3000
    assert compose_shrink_conf(["shrinking=progressive"]).shrinking.max_gradient_norm == 1.0
    conf = compose_conf(["shrinking=progressive"])
    assert (conf.shrinking.schedule, conf.shrinking.steps) == ("progressive", None)
    assert conf.finetune.max_gradient_norm == 1.0
    assert compose_conf(["shrinking=sandwich", "finetune.max_gradient_norm=2.0"]).finetune.max_gradient_norm == 2.0
    assert (compose_conf().shrinking.schedule, compose_conf().finetune.max_gradient_norm) == ("none", 0.0)


def test_a_group_set_to_null_is_refused():
    assert "supernet" in refused("supernet=null")
    assert "needs a name" in refused("supernet=null")
