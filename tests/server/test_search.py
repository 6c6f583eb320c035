"""`fedofa search` and `fedofa predictor` from the command line: what they print, write and refuse."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import yaml

from conf.compose import compose_predictor_conf, compose_profile_conf, compose_search_conf
from fedofa.device.latency import roofline_table
from fedofa.device.ofa_tables import ofa_entries
from fedofa.device.operators import OperatorIndex
from fedofa.device.profile import MeasuredDevice, describe_machine
from fedofa.finetune import planned_memory
from fedofa.finetune.inputs import ImageForm
from fedofa.finetune.memory import training_memory
from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.search.limits import Limit
from fedofa.supernet.families import build_supernet
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ConfigError, DatasetError, FedofaError, InfeasibilityError, ProfileError
from fedofa.types.space import SubnetConfig
from server import cli
from server.outputs import subnet_row
from server.predictor import read_pairs, run_predictor
from server.profile import run_profile
from server.search import SETTINGS, build_limits, build_models, run_search
from server.structure import describe_structure

pytest.importorskip("pymoo", reason="pymoo is missing; `make test` installs it")

SMALL = ["supernet=small", "in_channels=1", "num_classes=10"]
FAST = [*SMALL, "population=32", "generations=5"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Nothing is kept outside of the tests' own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDOFA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def index():
    conf = compose_search_conf([*SMALL, "device=none"])
    return OperatorIndex.of(build_supernet({**conf.supernet, "in_channels": 1, "num_classes": 10}))


@pytest.fixture(scope="module")
def board(index, tmp_path_factory):
    """A profile of a made-up board."""
    table = roofline_table(
        index, macs_per_second=1e8, bytes_per_second=1e9, launch_ms=0.02, engine="x", source="made up"
    )
    profile = DeviceProfile("board", 1e8, 1e8, 1e5, 1e5)
    device = MeasuredDevice(profile, 1e9, {**describe_machine(), "cores": 99}, "wall", table)
    path = tmp_path_factory.mktemp("device") / "board.json"
    path.write_text(json.dumps(device.to_json()))
    return path


def test_the_best_subnet_is_printed_and_written(board, tmp_path, capsys):
    output = tmp_path / "found" / "best.json"
    limits = ["latency_ms=15", "training_memory_mb=40", "energy_mj=5", "bytes_up=400000", "sram_kb=64"]
    assert cli.main(["search", *FAST, f"device={board}", *limits, f"output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "best: depth" in printed and "s of CPU) after loading" in printed
    (row,) = json.loads(output.read_text())
    assert row["costs"]["latency_ms"] <= 15 and row["costs"]["bytes_up"] <= 400000 and row["costs"]["sram_kb"] <= 64
    assert SubnetConfig.from_json(row["subnet"]).digest() in printed
    assert set(row["costs"]) == set(SETTINGS)


def test_the_pareto_set_is_printed(board, capsys):
    conf = compose_search_conf([*FAST, f"device={board}", "latency_ms=20", "pareto=true"])
    found = run_search(conf).found
    assert len(found) > 3
    assert all(item.costs["latency_ms"].value <= 20 for item in found)


def test_what_is_found_of_operators_is_kept_for_the_next_search(board, tmp_path, monkeypatch, capsys):
    settings = [*FAST, f"device={board}", "training_memory_mb=9", "lean=true", "micro_batch=1", "num_examples=40"]
    conf = compose_search_conf([*settings, f"cache_dir={tmp_path}"])
    first = run_search(conf).found
    (kept,) = tmp_path.glob("operators-*.json")
    content = kept.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(planned_memory, "trace_operator", lambda *_: pytest.fail("followed again"))
        assert run_search(conf).found == first
    kept.write_bytes(content[: len(content) // 2])
    assert run_search(conf).found == first
    assert kept.read_bytes() == content
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    assert run_search(compose_search_conf([*settings, f"cache_dir={tmp_path / 'file'}"])).found == first
    assert "cache_dir: what was found of operators cannot be kept" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("plan", ["full", "bias"])
def test_training_memory_is_limited_under_a_lean_plan(board, index, plan):
    limit = 9 if plan == "full" else 7.5
    levers = ["lean=true", "micro_batch=1", f"plan={plan}", "num_examples=40", "batch_size=8"]
    conf = compose_search_conf([*FAST, f"device={board}", *levers, f"training_memory_mb={limit}"])
    (found,) = run_search(conf).found
    assert found.costs["training_memory_mb"].value <= limit
    supernet = build_supernet({**conf.supernet, "in_channels": 1, "num_classes": 10})
    side, blocks = supernet.resolution(found.subnet), supernet.block_costs(found.subnet)
    figure = training_memory(
        supernet.structure(found.subnet),
        build_plan(plan, blocks, lean=True, micro_batch=1),
        LocalTraining(batch_size=8),
        40,
        ImageForm((1, side, side)),
    )
    assert 0.75 * limit < figure.total_bytes / 1e6 <= limit


def test_an_impossible_budget_is_one_clear_error(board, capsys):
    assert cli.main(["search", *FAST, f"device={board}", "latency_ms=0.5"]) == 1
    error = capsys.readouterr().err
    assert "latency_ms is exceeded by" in error and "the nearest" in error
    with pytest.raises(InfeasibilityError):
        run_search(compose_search_conf([*FAST, f"device={board}", "latency_ms=30", "bytes_up=10"]))


def test_published_tables_are_read(index, tmp_path):
    table = roofline_table(
        index, macs_per_second=1e8, bytes_per_second=1e9, launch_ms=0.02, engine="x", source="made up"
    )
    (tmp_path / "28_lookup_table.yaml").write_text(yaml.safe_dump(ofa_entries(table, index)))
    for device in (tmp_path, tmp_path / "28_lookup_table.yaml"):
        found = run_search(compose_search_conf([*FAST, f"device={device}", "latency_ms=15"])).found
        assert found[0].costs["latency_ms"].value <= 15


def test_a_folder_without_published_tables_is_named(tmp_path):
    (tmp_path / "board.json").touch()
    with pytest.raises(ProfileError, match=rf"device: {tmp_path}: .*expected YAML files in it, found none"):
        run_search(compose_search_conf([*FAST, f"device={tmp_path}"]))


def test_a_table_alone_is_a_device_too(index, tmp_path):
    table = roofline_table(
        index, macs_per_second=1e8, bytes_per_second=1e9, launch_ms=0.02, engine="x", source="made up"
    )
    path = tmp_path / "fpga.json"
    path.write_text(json.dumps(table.to_json()))
    assert run_search(compose_search_conf([*FAST, f"device={path}", "latency_ms=15"])).found


def test_a_battery_tightens_energy(board, index):
    overrides = [*FAST, f"device={board}", "energy_mj=4", "state_of_charge=0.6", "battery_reserve=0.2"]
    conf = compose_search_conf(overrides)
    (limit,) = build_limits(conf, build_models(conf, index)).limits
    assert isinstance(limit, Limit) and limit.most == pytest.approx(2.0)
    with pytest.raises(ConfigError, match="energy_mj, which is not given"):
        run_search(compose_search_conf([*FAST, f"device={board}", "state_of_charge=0.6"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training_memory_mb=0"], "training_memory_mb: expected a positive"),
        (["plan=everything"], "unknown plan 'everything'"),
        (["chip.dram=-1"], "chip 'eyeriss', dram"),
        (["batch_size=0"], "batch_size: expected at least 1"),
        (["micro_batch=-1"], "micro_batch: expected at least 0, found -1"),
        (["statistics=moving"], "finetune.statistics: expected 'batch' or 'frozen', found 'moving'"),
        (["optimiser_slots=-1"], "optimiser_slots: expected at least 0"),
        (["population=2"], "population: expected at least 8"),
    ],
)
def test_bad_settings_are_refused(board, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run_search(compose_search_conf([*FAST, f"device={board}", *overrides]))


def refused(*overrides):
    """The error of a search, whole, with the kind of error."""
    with pytest.raises(FedofaError) as caught:
        run_search(compose_search_conf([*FAST, *overrides]))
    return type(caught.value), str(caught.value)


def test_profiles_of_another_machine_or_family_are_refused(board):
    assert refused(f"device={board}", "any_machine=false") == (
        ProfileError,
        f"{board} is of another machine (cores: 99 there, {describe_machine()['cores']} here); profile this one into "
        "another file",
    )
    assert refused("supernet=resnet50", f"device={board}") == (
        ProfileError,
        "latency table of 'x': it is of family 'mobilenet_v3', the supernet of 'resnet'; profile the device with this "
        "supernet",
    )


def test_damaged_devices_are_refused(board, tmp_path):
    path = tmp_path / "damaged.json"
    path.write_text(board.read_text().replace('"cores": 99', '"cores": 98'))
    damaged = f"{path} is damaged: its checksum does not match; profile the device again"
    assert refused(f"device={path}") == (ProfileError, damaged)
    path.write_text("{")
    kind, text = refused(f"device={path}")
    assert kind is ProfileError
    assert text.startswith(f"{path} cannot be read: ") and text.endswith(f"`fedofa profile output={path}` makes one")
    path.write_text("[]")
    assert refused(f"device={path}") == (
        ProfileError,
        f"{path}: expected an object of format 'fedofa device profile 1', found []",
    )
    assert refused(f"device={tmp_path / 'absent.json'}")[1].startswith(f"{tmp_path / 'absent.json'} cannot be read: ")


def test_tables_with_wrong_or_missing_times_are_refused(index, tmp_path):
    table = roofline_table(
        index, macs_per_second=1e8, bytes_per_second=1e9, launch_ms=0.02, engine="phone", source="made up"
    ).to_json()
    del table["checksum"]
    key, path = next(iter(table["milliseconds"])), tmp_path / "table.json"
    count = len(table["milliseconds"])
    table["milliseconds"][key] = -1
    path.write_text(json.dumps(table))
    assert refused(f"device={path}") == (
        ProfileError,
        f"latency table of 'phone': 1 of {count} operators have no valid time; {key!r}: expected milliseconds, finite "
        "and not negative, found -1; measure it again",
    )
    del table["milliseconds"][key]
    path.write_text(json.dumps(table))
    assert refused(f"device={path}") == (
        ProfileError,
        f"latency table of 'phone': 1 of the space's {count} operators are not in it, among them {key!r}; profile the "
        "device with this supernet, or narrow the space (supernet.resolutions=[...]) to what was measured",
    )


UNITS = {
    "latency_ms": "ms",
    "inference_memory_mb": "MB",
    "training_memory_mb": "MB",
    "sram_kb": "KB",
    "energy_mj": "mJ",
    "bytes_up": "bytes",
    "bytes_down": "bytes",
    "macs": "MACs",
    "parameters": "parameters",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_negative_budgets_are_refused(board, index, setting):
    conf = compose_search_conf([*FAST, f"device={board}", f"{setting}=-3"])
    with pytest.raises(ConfigError) as caught:
        build_limits(conf, build_models(conf, index))
    assert str(caught.value) == f"{setting}: expected a positive finite number of {UNITS[setting]}, found -3.0"


def test_batteries_that_give_nothing_are_refused(board):
    assert refused(f"device={board}", "energy_mj=5", "state_of_charge=0.1") == (
        InfeasibilityError,
        "battery: its charge of 10% is at or below the reserve of 20%, so no energy is left; charge it, or lower the "
        "reserve",
    )
    assert refused(f"device={board}", "energy_mj=5", "state_of_charge=1.5") == (
        ConfigError,
        "battery: expected a state of charge in [0, 1] and a reserve in [0, 1), found 1.5 and 0.2",
    )


PRESETS = sorted(path.stem for path in Path(str(files("conf"))).glob("supernet/*.yaml"))
COMMANDS = {
    "search": (compose_search_conf, "device=any", run_search),
    "profile": (compose_profile_conf, "output=x", run_profile),
    "predictor": (compose_predictor_conf, "pairs=x", run_predictor),
}


class Built(Exception):
    """The supernet that a command builds, which is all that is wanted of it."""


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "fixed"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_elastic_preset_serves_the_commands_that_need_no_weights(command, preset, monkeypatch):
    def build(description):
        raise Built(build_supernet(description))

    compose, needed, run = COMMANDS[command]
    monkeypatch.setattr(f"server.{command}.build_supernet", build)
    with pytest.raises(Built) as built:
        run(compose([f"supernet={preset}", needed, "num_classes=7"]))
    (supernet,) = built.value.args
    assert supernet.space.count() > 1
    assert supernet.spec.num_classes == 7


def test_a_chain_is_searched(tmp_path):
    """Its weights, which the settings name, are not looked for."""
    chain = ["supernet=mobilenet_v2", "supernet.pretrained=nowhere.pth", "supernet.resolutions=[128,160]"]
    conf = compose_search_conf(
        [*chain, f"device={tmp_path / 'table.json'}", "macs=5e7", "population=32", "generations=2"]
    )
    index = OperatorIndex.of(build_supernet(describe_structure(conf.supernet, conf.in_channels, conf.num_classes)))
    table = roofline_table(
        index, macs_per_second=1e8, bytes_per_second=1e9, launch_ms=0.02, engine="x", source="made up"
    )
    (tmp_path / "table.json").write_text(json.dumps(table.to_json()))
    (found,) = run_search(conf).found
    assert found.costs["macs"].value <= 5e7
    assert index.encoding.space.contains(found.subnet)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_fixed_network_leaves_nothing_to_choose(command):
    compose, needed, run = COMMANDS[command]
    with pytest.raises(ConfigError, match=r"supernet\.family: .* found the fixed network.*take an elastic one"):
        run(compose(["supernet=fixed", needed]))


def test_settings_without_a_value_and_unknown_ones_are_named(capsys):
    assert cli.main(["search", "latency_ms=3"]) == 1
    assert "device" in capsys.readouterr().err
    assert cli.main(["search", "device=x", "latencyms=3"]) == 1
    assert "did you mean 'latency_ms'" in capsys.readouterr().err
    assert cli.main(["settings", "search", "device=x", "chip=microcontroller"]) == 0
    assert "buffer_bytes: 524288" in capsys.readouterr().out


@pytest.fixture
def pairs(index, tmp_path):
    """Subnets with an accuracy that their encoding says."""
    encoding = index.encoding
    rows = encoding.sample(np.random.default_rng(0), 120)
    weights = np.random.default_rng(1).normal(0, 0.01, encoding.num_features)
    accuracies = 0.8 + encoding.one_hot(rows) @ weights
    lines = [
        json.dumps({"subnet": encoding.subnet(row).to_json(), "accuracy": float(accuracy)})
        for row, accuracy in zip(rows, accuracies, strict=True)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_predictor_is_trained_and_searched_with(pairs, board, tmp_path, capsys):
    output = tmp_path / "predictor.safetensors"
    assert cli.main(["predictor", *SMALL, f"pairs={pairs}", f"output={output}", "kind=ridge"]) == 0
    assert "rank correlation 1.000" in capsys.readouterr().out
    found = run_search(compose_search_conf([*FAST, f"device={board}", f"predictor={output}", "latency_ms=20"])).found
    assert 0.7 < found[0].accuracy < 0.95


def test_a_runs_summary_has_pairs(pairs, index, tmp_path):
    supernet = build_supernet(
        compose_predictor_conf([*SMALL, "pairs=x"]).supernet | {"in_channels": 1, "num_classes": 10}
    )
    expected = list(read_pairs(pairs, index.encoding))
    rows = [subnet_row(supernet, "random", subnet, accuracy) for subnet, accuracy in expected[:20]]
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text(json.dumps({"subnets": rows}))
    assert list(read_pairs(run, index.encoding)) == expected[:20]
    (run / "summary.json").write_text("{}")
    with pytest.raises(DatasetError, match="summary.json cannot be read"):
        list(read_pairs(run, index.encoding))


def test_lines_that_are_no_pairs_are_named(pairs, index, tmp_path):
    lines = pairs.read_text().splitlines()
    for wrong, message in (("{", "entry 121"), ('{"subnet": {}, "accuracy": 1}', "not a subnet"), ("[]", "entry 121")):
        pairs.write_text("\n".join([*lines, wrong]))
        with pytest.raises(DatasetError, match=message):
            run_predictor(compose_predictor_conf([*SMALL, f"pairs={pairs}", f"output={tmp_path / 'p'}"]))
    with pytest.raises(DatasetError, match="cannot be read"):
        run_predictor(compose_predictor_conf([*SMALL, f"pairs={tmp_path / 'absent'}", f"output={tmp_path / 'p'}"]))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "docs" / "tables").glob("*.json")), ids=lambda p: p.stem
)
def test_the_example_tables_load_and_state_their_source(path, index):
    content = json.loads(path.read_text())
    assert content["source"].startswith(("made up", "measured"))
    conf = compose_search_conf([*FAST, f"device={path}"])
    batch = index.batch([index.encoding.space.smallest(), index.encoding.space.largest()])
    smallest, largest = build_models(conf, index)["latency_ms"].predict(batch)
    assert 0 < smallest < largest
