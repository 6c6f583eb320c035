"""Device profiles: round trip and refusals."""

import json

import pytest

from fedofa.types.device import NAME, DeviceProfile, class_name
from fedofa.types.errors import ConfigError

PROFILE = DeviceProfile("phone", 1e9, 2e9, 8e3, 2.5e5, 0.7)
RATES = ("memory_bytes", "macs_per_second", "uplink_bytes_per_second", "downlink_bytes_per_second", "availability")


def test_round_trip():
    assert DeviceProfile.from_json(json.loads(json.dumps(PROFILE.to_json()))) == PROFILE


def test_availability_may_be_left_out():
    value = PROFILE.to_json()
    del value["availability"]
    assert DeviceProfile.from_json(value).availability == 1.0


def test_the_engine_is_torch_where_none_is_stated_and_one_of_two():
    value = PROFILE.to_json()
    del value["engine"]
    assert DeviceProfile.from_json(value).engine == "torch"
    assert DeviceProfile.from_json({**value, "engine": "onnxruntime"}).engine == "onnxruntime"
    for bad in ("tensorflow", None, ["torch"]):
        with pytest.raises(ConfigError, match=r"'phone', engine: expected one of \['torch', 'onnxruntime'\], found"):
            DeviceProfile.from_json({**value, "engine": bad})


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), "1", None])
def test_every_number_must_be_positive_and_finite(name, bad):
    with pytest.raises(ConfigError, match=rf"'phone', {name}: expected a positive finite number"):
        DeviceProfile.from_json({**PROFILE.to_json(), name: bad})


def test_availability_is_a_probability():
    with pytest.raises(ConfigError, match=r"availability: expected a probability in \(0, 1\], found 1\.5"):
        DeviceProfile("phone", 1, 1, 1, 1, 1.5)


@pytest.mark.parametrize("name", ["device_class", *RATES[:-1]])
def test_what_is_missing_is_named(name):
    value = PROFILE.to_json()
    del value[name]
    with pytest.raises(ConfigError, match=rf"missing \['{name}'\], unknown \[\]"):
        DeviceProfile.from_json(value)


def test_what_is_unknown_is_named():
    with pytest.raises(ConfigError, match=r"missing \[\], unknown \['colour'\]"):
        DeviceProfile.from_json({**PROFILE.to_json(), "colour": "red"})


@pytest.mark.parametrize(
    "change",
    [{"memory_bytes": 10**400}, {"memory_bytes": True}, {"device_class": {"a": 1}}, {"device_class": 3}],
    ids=["huge", "bool", "unhashable class", "number as class"],
)
def test_a_hostile_profile_is_refused(change):
    with pytest.raises(ConfigError):
        DeviceProfile.from_json({**PROFILE.to_json(), **change})


@pytest.mark.parametrize(
    ("processor", "name"),
    [
        ("AMD EPYC", "AMD EPYC"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel Xeon CPU 2.20GHz"),
        ("(TM) Würfel/8", "Wrfel8"),
        ("@", "device"),
        ("x" * 100, "x" * 64),
    ],
)
def test_every_processor_gives_a_name_that_a_server_takes(processor, name):
    assert class_name(processor) == name
    assert NAME.fullmatch(name)
