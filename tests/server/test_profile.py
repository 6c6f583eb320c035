"""`fedofa profile` with an engine whose times are known: the table, its correction, resuming, and what is refused."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from conf.compose import compose_profile_conf
from fedofa.device import engines, timing
from fedofa.device.engines import Engine
from fedofa.device.latency import Latency
from fedofa.device.memory import InferenceMemory
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.device.profile import MeasuredDevice, check_machine, describe_machine, free_memory_bytes, load_device
from fedofa.device.rates import memory_bytes_per_second, training_macs_per_second
from fedofa.supernet.families import build_supernet
from fedofa.types.errors import ConfigError, ProfileError
from server import cli, forward_memory
from server.forward_memory import forward_bytes
from server.profile import _chunks, run_profile, summary_lines

SMALL = ["supernet=small", "in_channels=1", "num_classes=10", "device_class=board"]


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A device of its own clock, on which a chain of operators takes 25% and 0.3 ms longer than they do alone."""
    state = type("State", (), {"now": 0, "noise": lambda self: 1.0, "prepared": 0, "runs": 0})()
    macs = {}

    class KnownEngine(Engine):
        package = "torch"

        def prepare(self, operators):
            state.prepared += 1
            alone = sum(macs_of(operator) for operator in operators)
            milliseconds = alone if len(operators) == 1 else 1.25 * alone + 0.3

            def run():
                state.runs += 1
                state.now += int(milliseconds * state.noise() * 1e6)

            return run

    def macs_of(operator):
        if not macs:
            index = OperatorIndex.of(small_supernet())
            table = index.operator_table(lambda cost: cost.macs)
            macs.update({op.key: 0.05 + count * 1e-5 for op, count in zip(index.operators, table, strict=True)})
        return macs[operator.key]

    monkeypatch.setitem(engines.ENGINES, "torch", KnownEngine)
    monkeypatch.setattr("server.profile.training_macs_per_second", lambda spec, threads, clock: 1e9)
    monkeypatch.setattr("server.profile.memory_bytes_per_second", lambda clock: 1e10)
    monkeypatch.setattr("server.profile.forward_bytes", lambda supernet, subnet: 1_000_000)
    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: state.now)
    state.output = tmp_path / "runs" / "board.json"
    return state


def small_supernet():
    conf = compose_profile_conf(SMALL)
    return build_supernet({**conf.supernet, "in_channels": 1, "num_classes": 10})


def settings(device, *more):
    return compose_profile_conf([*SMALL, f"output={device.output}", *more])


def test_a_profile_predicts_whole_networks(device):
    measured = run_profile(settings(device, "validate=true", "memory_bytes=1e9"))
    assert load_device(device.output) == measured
    assert measured.fit["mape"] < 0.01 < 0.1 < measured.fit["mape_of_the_plain_sum"]
    assert measured.fit["rank_correlation"] > 0.99
    assert measured.profile.device_class == "board" and measured.profile.memory_bytes == 1e9
    assert measured.profile.macs_per_second == 1e9 and measured.memory_bytes_per_second == 1e10
    assert not device.output.with_name("board.json.part").exists()
    index = OperatorIndex.of(small_supernet())
    batch = SubnetBatch(index, index.encoding.sample(np.random.default_rng(0), 5))
    assert (Latency(index, measured.latency).predict(batch) > 0.3).all()
    lines = list(summary_lines(measured))
    assert any("held-out subnets: error" in line for line in lines)
    assert "memory of a forward pass of 5 subnets" in lines[-1] and lines[-1].endswith("DOES NOT HOLD")
    held = replace(measured, fit={**measured.fit, "memory_least_ratio": 1.0, "memory_greatest_ratio": 1.1})
    assert list(summary_lines(held))[-1].endswith("1.000 to 1.100 of the measured: the bound, 1.00 to 1.10, holds")
    with pytest.raises(ConfigError, match="device_class: expected a name like"):
        run_profile(settings(device, "device_class='a/b'"))
    memory = InferenceMemory(index)
    assert measured.fit["memory_least_ratio"] == memory.predict_one(index.encoding.space.smallest()).value
    assert measured.fit["memory_greatest_ratio"] == memory.predict_one(index.encoding.space.largest()).value


@pytest.mark.slow
def test_a_forward_pass_in_a_process_of_its_own_takes_what_is_predicted():
    conf = compose_profile_conf(["supernet=published"])
    supernet = {**conf.supernet, "in_channels": 3, "num_classes": 1000}
    index = OperatorIndex.of(build_supernet(supernet))
    for subnet in (index.encoding.space.smallest(), index.encoding.space.largest()):
        measured, predicted = forward_bytes(supernet, subnet), InferenceMemory(index).predict_one(subnet).value * 1e6
        assert measured <= predicted <= 1.1 * measured


def test_a_forward_pass_counts_only_when_no_page_of_a_file_comes_or_goes(monkeypatch):
    files = iter([100, 100, 110, 110, 105, 105, 105])
    known = {"VmRSS": 1000, "VmHWM": 1500}
    monkeypatch.setattr(forward_memory, "_resident", lambda name: known.get(name) or next(files))
    monkeypatch.setattr(forward_memory, "_reset_peak", lambda: None)
    monkeypatch.setattr(forward_memory, "tune_allocator", lambda: None)
    conf = {**compose_profile_conf(SMALL).supernet, "in_channels": 1, "num_classes": 10}
    choices = build_supernet(conf).space.smallest().to_json()
    assert forward_memory._measure(conf, choices) == (1500 - 105) - (1000 - 100)
    pages = itertools.count()
    monkeypatch.setattr(forward_memory, "_resident", lambda name: known.get(name) or next(pages))
    with pytest.raises(ProfileError, match="took pages of libraries away"):
        forward_memory._measure(conf, choices)


def test_a_forward_pass_that_fails_is_named():
    with pytest.raises(ProfileError, match="memory of a forward pass: its process ended with .*nowhere"):
        forward_bytes({"family": "nowhere"}, small_supernet().space.smallest())


def test_rates_of_this_machine_are_those_of_a_computer():
    supernet = small_supernet()
    assert 1e6 < training_macs_per_second(supernet.network_spec(supernet.space.smallest()), 1, "cpu") < 1e13
    assert 1e7 < memory_bytes_per_second("cpu") < 1e13


def test_an_interrupted_profile_goes_on(device, monkeypatch):
    noise = iter([1.0] * 2500)

    def interrupt():
        if next(noise, None) is None:
            raise KeyboardInterrupt
        return 1.0

    device.noise = interrupt
    with pytest.raises(KeyboardInterrupt):
        run_profile(settings(device))
    kept = json.loads(device.output.with_name("board.json.part").read_text())["readings"]
    device.noise, device.runs = (lambda: 1.0), 0
    resumed = run_profile(settings(device, "resume=true"))
    left, device.runs = device.runs, 0
    assert run_profile(settings(device)).latency == resumed.latency
    assert device.runs - left == 5 * sum(len(row) for row in kept.values()) > 0


def test_a_noisy_device_is_refused_and_what_was_steady_is_kept(device):
    rng = np.random.default_rng(0)
    device.noise = lambda: rng.uniform(1, 9)
    with pytest.raises(ProfileError, match="too noisy.*a spread of.*resume=true"):
        run_profile(settings(device, "burst=1", "more_passes=2"))
    assert not device.output.exists()
    device.noise = lambda: 1.0
    assert run_profile(settings(device, "burst=1", "resume=true")).fit is None


def test_chunks_fit_into_memory():
    sizes = {"a": 9_000_000, "b": 8_000_000, "c": 7_000_000, "d": 40_000_000, "e": 1}
    assert list(_chunks(list(sizes), sizes, 16_000_000)) == [["a"], ["b", "c"], ["d"], ["e"]]
    assert list(_chunks(list(sizes), sizes, 10**9)) == [list(sizes)]


def test_a_small_device_measures_in_chunks_what_a_large_one_measures_at_once(device):
    large = run_profile(settings(device))
    prepared, device.prepared = device.prepared, 0
    small = run_profile(settings(device, "memory_bytes=2e6"))
    assert device.prepared == prepared
    assert small.latency == large.latency


def test_readings_of_other_settings_are_refused(device):
    rng = np.random.default_rng(0)
    device.noise = lambda: rng.uniform(1, 9)
    with pytest.raises(ProfileError):
        run_profile(settings(device, "burst=1", "more_passes=0"))
    with pytest.raises(ProfileError, match="other settings: burst: 1 then, 2 now"):
        run_profile(settings(device, "burst=2", "resume=true"))
    device.output.with_name("board.json.part").write_text("{")
    with pytest.raises(ProfileError, match="is damaged"):
        run_profile(settings(device, "burst=1", "resume=true"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine=tflite", r"^engine: expected one of \['torch', 'onnxruntime'\], found 'tflite'$"),
        ("threads=0", "threads: expected at least 1"),
        ("calibration_subnets=2", "calibration_subnets: expected at least 8"),
        ("num_classes=0", "num_classes"),
        ("passes=1", "passes: expected at least 3"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_measured(device, override, message):
    with pytest.raises(ConfigError, match=message):
        run_profile(settings(device, override))
    assert not device.output.parent.exists()


def test_processor_time_is_for_one_thread(device):
    with pytest.raises(ConfigError, match="clock=cpu"):
        run_profile(settings(device, "clock=cpu", "threads=2"))


def test_damaged_profiles_are_refused(device):
    content = run_profile(settings(device)).to_json()
    with pytest.raises(ProfileError, match="checksum"):
        MeasuredDevice.from_json({**content, "clock": "cpu"})
    with pytest.raises(ProfileError, match="expected an object of format"):
        MeasuredDevice.from_json([], "board.json")
    del content["checksum"], content["machine"]
    with pytest.raises(ProfileError, match="not a device profile.*machine"):
        MeasuredDevice.from_json(content)
    device.output.write_text("{")
    with pytest.raises(ProfileError, match="cannot be read"):
        load_device(device.output)


def test_another_machine_is_refused():
    check_machine(describe_machine(), "here.json")
    with pytest.raises(ProfileError, match="another machine.*cores: 99 there"):
        check_machine({**describe_machine(), "cores": 99}, "there.json")


def test_free_memory_is_the_least_of_what_is_said(tmp_path):
    meminfo, limit, usage = (tmp_path / name for name in ("meminfo", "limit", "usage"))
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    limit.write_text("max\n")
    usage.write_text("1000\n")
    assert free_memory_bytes([(limit, usage)], meminfo) == 50 * 1024
    limit.write_text("4000\n")
    assert free_memory_bytes([(limit, usage)], meminfo) == 3000
    with pytest.raises(ConfigError, match="memory_bytes"):
        free_memory_bytes([], tmp_path / "absent")


def test_the_command_prints_what_it_measured(device, capsys):
    assert cli.main(["profile", *SMALL, f"output={device.output}"]) == 0
    assert "operators of mobilenet_v3 with torch" in capsys.readouterr().out
    assert cli.main(["profile", "engin=torch"]) == 1
    assert "did you mean 'engine'" in capsys.readouterr().err
