"""Latency tables: sums by hand, files that are refused, and Once-for-All's own format against its own code."""

import json
import sys
import types

import numpy as np
import pytest
import yaml

from fedofa.device.latency import Latency, roofline_table
from fedofa.device.ofa_tables import load_ofa_table, ofa_entries
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.device.tables import LatencyTable
from fedofa.supernet.families import build_elastic
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.supernet.proxyless import ProxylessSpec
from fedofa.supernet.resnet import ResNetSpec
from fedofa.types.errors import ProfileError

WIDE = MobileNetV3Spec(resolutions=(160, 224)).scaled(1.2)


@pytest.fixture(scope="module")
def index():
    return OperatorIndex.of(build_elastic(WIDE))


def random_table(index, seed=0):
    times = np.random.default_rng(seed).uniform(0.01, 2.0, len(index.operators))
    milliseconds = {operator.key: float(ms) for operator, ms in zip(index.operators, times, strict=True)}
    return LatencyTable(index.encoding.space.family, "torch", 1, "made up", milliseconds, overhead_ms=0.5)


def test_a_subnets_latency_is_the_sum_of_its_operators(index):
    table = random_table(index)
    rows = index.encoding.sample(np.random.default_rng(1), 20)
    batch = SubnetBatch(index, rows)
    latency = Latency(index, table)
    for numbers, predicted in zip(batch.operators, latency.predict(batch), strict=True):
        keys = [index.operators[number].key for number in numbers if number >= 0]
        assert predicted == pytest.approx(0.5 + sum(table.milliseconds[key] for key in keys))
    assert str(latency.predict_one(index.encoding.subnet(rows[0]))).endswith(" ms")


def test_a_table_survives_its_file(index):
    table = random_table(index)
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    by_hand = table.to_json()
    del by_hand["checksum"], by_hand["overhead_ms"]
    assert LatencyTable.from_json(by_hand).overhead_ms == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 2}, "checksum does not match"),
        ({"format": "something"}, "expected an object of format"),
        ({"checksum": None, "engines": 1}, "checksum"),
    ],
)
def test_a_damaged_table_is_refused(index, change, message):
    with pytest.raises(ProfileError, match=message):
        LatencyTable.from_json({**random_table(index).to_json(), **change}, "phone.json")


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", None, True])
def test_a_time_that_is_none_is_refused(value):
    with pytest.raises(ProfileError, match="'conv'.*not negative"):
        LatencyTable("mobilenet_v3", "torch", 1, "made up", {"conv": value})


def test_fields_are_named(index):
    content = random_table(index).to_json()
    del content["checksum"], content["engine"]
    with pytest.raises(ProfileError, match=r"missing \['engine'\]"):
        LatencyTable.from_json(content)
    with pytest.raises(ProfileError, match=r"unknown \['colour'\]"):
        LatencyTable.from_json({**content, "engine": "x", "colour": 1})


def test_tables_of_other_spaces_are_refused(index):
    table = random_table(index)
    other = OperatorIndex.of(build_elastic(ResNetSpec(resolutions=(128,))))
    with pytest.raises(ProfileError, match="is of family 'mobilenet_v3', the supernet of 'resnet'"):
        Latency(other, table)
    larger = OperatorIndex.of(build_elastic(MobileNetV3Spec(resolutions=(128, 160)).scaled(1.2)))
    with pytest.raises(ProfileError, match="operators are not in it.*supernet.resolutions"):
        Latency(larger, table)


def test_a_roofline_is_arithmetic_or_traffic(index):
    macs = index.operator_table(lambda cost: cost.macs)
    slow = roofline_table(
        index, macs_per_second=1e6, bytes_per_second=1e15, launch_ms=0.25, engine="x", source="made up"
    )
    expected = {operator.key: 0.25 + m / 1e3 for operator, m in zip(index.operators, macs, strict=True)}
    assert slow.milliseconds == pytest.approx(expected, rel=1e-6)
    narrow = roofline_table(
        index, macs_per_second=1e18, bytes_per_second=1e6, launch_ms=0.0, engine="x", source="made up"
    )
    (pool, *_) = [operator for operator in index.operators if operator.key.startswith("pool")]
    assert narrow.milliseconds[pool.key] == pytest.approx(4 * (pool.input_elements + pool.output_elements) / 1e3)


@pytest.fixture
def published(index, tmp_path):
    """The table of one device in the published format, one file a resolution."""
    entries = ofa_entries(random_table(index), index)
    paths = []
    for resolution in (160, 224):
        paths.append(tmp_path / f"{resolution}_lookup_table.yaml")
        paths[-1].write_text(yaml.safe_dump({key: {**value, "count": 1} for key, value in entries.items()}))
    return paths


def test_published_tables_give_what_once_for_alls_own_code_gives(index, published, ofa_networks, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", types.ModuleType("gdown"))  # imported by the peer, and not used here
    latency_table = pytest.importorskip("ofa.tutorial.latency_table")
    table = load_ofa_table(published, index, "phone")
    estimator = object.__new__(latency_table.LatencyEstimator)
    estimator.lut = yaml.safe_load(published[0].read_text())
    latency = Latency(index, table)
    rng = np.random.default_rng(2)
    for row in index.encoding.sample(rng, 20):
        subnet = index.encoding.subnet(row)
        theirs = estimator.predict_network_latency_given_spec(_specification(subnet))
        assert latency.predict_one(subnet).value == pytest.approx(theirs, rel=1e-9)


def _specification(subnet):
    values = {"kernel": (3, 5, 7), "expand": (3, 4, 6), "depth": (2, 3, 4)}
    ks, e, d = ([values[axis][max(i, 0)] for i in subnet[axis]] for axis in ("kernel", "expand", "depth"))
    return {"ks": ks, "e": e, "d": d, "r": [(160, 224)[subnet["resolution"][0]]]}


def test_proxyless_tables_count_pooling_with_the_classifier(tmp_path):
    index = OperatorIndex.of(build_elastic(ProxylessSpec(resolutions=(224,))))
    entries = ofa_entries(random_table(index), index)
    assert "expanded_conv-input:56x56x24-output:56x56x24-expand:6-kernel:7-stride:1-idskip:1" in entries
    assert [key for key in entries if key.startswith("Logits")] == ["Logits-input:7x7x1280-output:1000"]
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(entries))
    table = load_ofa_table([path], index, "phone")
    Latency(index, table)
    classifier = next(key for key in table.milliseconds if key.startswith("linear"))
    assert table.milliseconds[classifier] == 0


def test_published_tables_without_a_file_are_refused(index):
    with pytest.raises(ProfileError, match="published latency tables: expected at least one file, found none"):
        load_ofa_table([], index, "phone")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read"),
        ("- 1", "expected a mapping"),
        ("other: {mean: 1.0}", "no operator of this"),
        ("Conv-input:160x160x3-output:80x80x24: {median: 1.0}", "expected {mean: milliseconds}"),
    ],
)
def test_damaged_published_tables_are_refused(index, tmp_path, text, message):
    path = tmp_path / "table.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message):
        load_ofa_table([path], index, "phone")
