"""Accuracy predictors: what they learn, their files, and Once-for-All's published format against its own code."""

import itertools

import numpy as np
import pytest
import torch
from cohorts import SPECS

from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.search.accuracy import (
    AccuracyPredictor,
    DenseLayer,
    NetworkPredictor,
    ZeroCostProxy,
    encode_predictor,
    load_predictor,
)
from fedofa.search.learning import train_predictor
from fedofa.supernet.families import build_elastic
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.types.encoding import Encoding
from fedofa.types.errors import CheckpointError, ConfigError
from fedofa.types.spaces import PUBLISHED_SPACES, mbconv_space

ENCODING = Encoding(PUBLISHED_SPACES["mobilenet_v3"])


def drawn(count, seed=0):
    return ENCODING.sample(np.random.default_rng(seed), count)


def linear_accuracies(rows):
    weights = np.random.default_rng(7).normal(0, 1, ENCODING.num_features)
    return 0.7 + 0.01 * ENCODING.one_hot(rows) @ weights


@pytest.mark.parametrize(("kind", "least"), [("ridge", 0.99), ("mlp", 0.9)])
def test_predictors_rank_subnets_that_they_have_not_seen(kind, least):
    rows = drawn(400)
    noise = np.random.default_rng(1).normal(0, 1e-3, 400)
    predictor, held_out = train_predictor(
        ENCODING, rows, linear_accuracies(rows) + noise, kind=kind, held_out_fraction=0.25, seed=0
    )
    assert (held_out.num_train, held_out.num_held_out) == (300, 100)
    assert held_out.rank_correlation > least
    fresh = drawn(200, seed=5)
    error = predictor.predict_features(ENCODING.one_hot(fresh)) - linear_accuracies(fresh)
    assert np.abs(error).mean() < 2 * held_out.mean_absolute_error < np.std(linear_accuracies(fresh))


def test_a_shuffled_accuracy_cannot_be_learned():
    rows = drawn(300)
    shuffled = np.random.default_rng(0).permutation(linear_accuracies(rows))
    _, held_out = train_predictor(ENCODING, rows, shuffled, kind="ridge", held_out_fraction=0.3, seed=0)
    assert abs(held_out.rank_correlation) < 0.3


def test_a_predictor_survives_its_file(tmp_path):
    rows = drawn(60)
    predictor, held_out = train_predictor(
        ENCODING, rows, linear_accuracies(rows), kind="mlp", held_out_fraction=0.2, seed=0
    )
    path = tmp_path / "predictor.safetensors"
    path.write_bytes(encode_predictor(predictor, {"rank_correlation": held_out.rank_correlation}))
    features = ENCODING.one_hot(drawn(20, seed=2))
    loaded = load_predictor(path, ENCODING.space)
    assert np.array_equal(loaded.predict_features(features), predictor.predict_features(features))
    with pytest.raises(CheckpointError, match="another space"):
        load_predictor(path, PUBLISHED_SPACES["proxyless"])
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_predictor(path, ENCODING.space)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "forest"}, "expected one of"),
        ({"held_out_fraction": 1.0}, "held_out_fraction"),
        ({"rows": drawn(5), "accuracies": np.ones(5)}, "at least 10"),
        ({"accuracies": np.full(40, np.nan)}, "finite"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(change, message):
    arguments = {"rows": drawn(40), "accuracies": np.ones(40), "kind": "mlp", "held_out_fraction": 0.2, **change}
    rows, accuracies = arguments.pop("rows"), arguments.pop("accuracies")
    with pytest.raises(ConfigError, match=message):
        train_predictor(ENCODING, rows, accuracies, seed=0, **arguments)


def test_the_proxy_is_monotonic_in_size():
    index = OperatorIndex.of(build_elastic(SPECS["mobilenet_v3"]))
    space = index.encoding.space
    batch = index.batch([space.smallest(), space.largest()])
    smallest, largest = ZeroCostProxy(index).predict(batch)
    assert smallest < largest
    rows = index.encoding.sample(np.random.default_rng(0), 50)
    values = ZeroCostProxy(index).predict(SubnetBatch(index, rows))
    assert ((values >= smallest) & (values <= largest)).all()


# -- the published format --------------------------------------------------------------------------------------------


def specification(subnet):
    """The package's dictionary, with what both of its encoders read."""
    values = subnet.to_ofa()
    return {**{key: [int(x) for x in row] for key, row in values.items()}, "image_size": int(values["r"][0])}


def published_tutorial(path):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, (a, b) in zip((0, 2, 4, 6), ((128, 400), (400, 400), (400, 400), (400, 1)), strict=True):
        state[f"{number}.weight"] = torch.randn(b, a, generator=generator) / a**0.5
        state[f"{number}.bias"] = torch.randn(b, generator=generator)
    torch.save(state, path)
    return state


def test_the_tutorials_predictor_gives_what_its_own_code_gives(tmp_path, ofa_networks, monkeypatch):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "gdown", types.ModuleType("gdown"))  # imported by the peer, and not used here
    peer = pytest.importorskip("ofa.tutorial.accuracy_predictor").AccuracyPredictor(pretrained=False, device="cpu")
    state = published_tutorial(tmp_path / "acc_predictor.pth")
    peer.model.load_state_dict(state)
    predictor = load_predictor(tmp_path / "acc_predictor.pth", ENCODING.space)
    rows = drawn(30)
    theirs = peer.predict_accuracy([specification(ENCODING.subnet(row)) for row in rows])[:, 0].numpy()
    np.testing.assert_allclose(predictor.predict_features(ENCODING.one_hot(rows)), theirs, rtol=1e-4, atol=1e-4)


def test_the_librarys_predictor_gives_what_its_own_code_gives(tmp_path, ofa_networks):
    encoders = pytest.importorskip("ofa.nas.accuracy_predictor.arch_encoder")
    predictors = pytest.importorskip("ofa.nas.accuracy_predictor.acc_predictor")
    resolutions = [int(side) for side in ENCODING.space.axis("resolution").values]
    torch.manual_seed(0)
    peer = predictors.AccuracyPredictor(encoders.MobileNetArchEncoder(image_size_list=resolutions), device="cpu")
    peer.base_acc.fill_(0.75)
    torch.save({"state_dict": peer.state_dict()}, tmp_path / "predictor.pth")
    predictor = load_predictor(tmp_path / "predictor.pth", ENCODING.space)
    rows = drawn(30)
    with torch.no_grad():
        theirs = peer.predict_acc([specification(ENCODING.subnet(row)) for row in rows]).numpy()
    np.testing.assert_allclose(predictor.predict_features(ENCODING.one_hot(rows)), theirs, rtol=1e-4, atol=1e-5)


def test_published_predictors_of_other_spaces_are_refused(tmp_path):
    path = tmp_path / "acc_predictor.pth"
    published_tutorial(path)
    with pytest.raises(CheckpointError, match="no space of family 'resnet'"):
        load_predictor(path, PUBLISHED_SPACES["resnet"])
    other = mbconv_space("mobilenet_v3", 5, (3, 5, 7), (3, 4, 6), (2, 3, 4), (100, 224))
    with pytest.raises(CheckpointError, match="use the space it was trained for"):
        load_predictor(path, other)
    path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_predictor(path, ENCODING.space)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_predictor(tmp_path / "evil.pth", ENCODING.space)
    assert not (tmp_path / "ran").exists()


def test_a_published_predictor_is_a_network_predictor(tmp_path):
    published_tutorial(tmp_path / "a.pth")
    index = OperatorIndex.of(build_elastic(MobileNetV3Spec()))
    predictor = load_predictor(tmp_path / "a.pth", index.encoding.space)
    assert isinstance(predictor, NetworkPredictor)
    assert predictor.predict(SubnetBatch(index, drawn(4))).shape == (4,)


@pytest.mark.parametrize("name", sorted(SPECS))
@pytest.mark.parametrize("slopes_of", [AccuracyPredictor.slopes, NetworkPredictor.slopes])
def test_slopes_of_a_linear_predictor_say_what_any_change_does(name, slopes_of):
    index = OperatorIndex.of(build_elastic(SPECS[name]))
    weight = np.random.default_rng(2).normal(0, 1, (1, index.encoding.num_features)).astype(np.float32)
    predictor = NetworkPredictor(index.encoding.space, [DenseLayer(weight, np.zeros(1, np.float32))], 3.0)
    rows, others = index.encoding.sample(np.random.default_rng(3), 24).reshape(2, 12, -1)
    slopes = slopes_of(predictor, SubnetBatch(index, rows))
    change = (slopes * (index.encoding.one_hot(others) - index.encoding.one_hot(rows))).sum(axis=1)
    found = predictor.predict(SubnetBatch(index, others)) - predictor.predict(SubnetBatch(index, rows))
    assert change == pytest.approx(found, abs=1e-4)


def test_slopes_of_a_network_are_what_small_changes_of_its_features_do():
    index = OperatorIndex.of(build_elastic(SPECS["mobilenet_v3"]))
    rng, sizes = np.random.default_rng(8), (index.encoding.num_features, 12, 9, 1)
    layers = [DenseLayer(rng.normal(0, 1, (b, a)), rng.normal(0, 1, b)) for a, b in itertools.pairwise(sizes)]
    predictor = NetworkPredictor(index.encoding.space, layers)
    rows = index.encoding.sample(rng, 6)
    slopes = predictor.slopes(SubnetBatch(index, rows))
    features = index.encoding.one_hot(rows).astype(np.float64)
    for number in range(sizes[0]):
        moved = features.copy()
        moved[:, number] += 1e-7
        found = (predictor.predict_features(moved) - predictor.predict_features(features)) / 1e-7
        assert found == pytest.approx(slopes[:, number], rel=1e-4, abs=1e-4)
