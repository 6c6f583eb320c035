"""What every supernet does: skeletons, cutting, the differentiable forward pass, orderings and states."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import SPEC, build_supernet, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.supernet.families import build_elastic
from fedofa.supernet.fixed import FixedSupernet
from fedofa.types.errors import CheckpointError, SpaceError
from fedofa.types.space import SubnetConfig

SUPERNETS = {norm: build_supernet(norm=norm) for norm in ("group", "batch")}
norms = st.sampled_from(sorted(SUPERNETS))
some = settings(max_examples=15, deadline=None)


def sample(norm: str, seed: int) -> SubnetConfig:
    return SUPERNETS[norm].space.sample(np.random.default_rng(seed))


def images(side: int, batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 1, side, side, generator=torch.Generator().manual_seed(seed))


@some
@given(norms, seeds)
def test_the_skeleton_has_the_names_shapes_and_roles_of_the_parameter_table(norm, seed):
    supernet, subnet = SUPERNETS[norm], sample(norm, seed)
    skeleton = supernet.skeleton(subnet)
    table = supernet.parameter_table(subnet)
    parameters = {name: tuple(tensor.shape) for name, tensor in skeleton.named_parameters()}
    buffers = {name: tuple(tensor.shape) for name, tensor in skeleton.named_buffers()}
    assert parameters == {item.name: item.shape for item in table if item.role != "statistic"}
    assert buffers == {item.name: item.shape for item in table if item.role == "statistic"}
    assert bool(buffers) == (norm == "batch")
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    assert [item.name for item in supernet.slice_map(subnet)] == [item.name for item in table]


@some
@given(norms, seeds)
def test_a_built_subnet_computes_what_forward_computes(norm, seed):
    supernet, subnet = SUPERNETS[norm].eval(), sample(norm, seed)
    x = images(supernet.resolution(subnet), seed=seed)
    with torch.no_grad():
        expected = supernet(x, subnet)
        assert expected.shape == (3, SPEC.num_classes)
        torch.testing.assert_close(supernet.build(subnet).eval()(x), expected, atol=1e-6, rtol=1e-6)
        shared = {name: torch.from_numpy(array) for name, array in supernet.state().tensors.items()}
        torch.testing.assert_close(supernet.build(subnet, shared).eval()(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_built_subnet_owns_its_memory(norm):
    supernet = SUPERNETS[norm]
    for subnet in (supernet.space.largest(), supernet.space.smallest()):
        before = supernet.state().digest()
        given_tensors = {name: tensor.detach().clone() for name, tensor in supernet.shared().items()}
        model = supernet.build(subnet, given_tensors).train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        model(images(supernet.resolution(subnet))).square().sum().backward()
        optimiser.step()
        with torch.no_grad():
            changed = supernet.build(subnet).state_dict()
            assert any(not torch.equal(tensor, changed[name]) for name, tensor in model.state_dict().items())
        assert supernet.state().digest() == before
        for name, tensor in given_tensors.items():
            assert torch.equal(tensor, supernet.shared()[name])


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_an_attached_subnet_computes_the_same_on_the_arrays_own_memory_and_leaves_them(norm):
    supernet = SUPERNETS[norm].eval()
    state = supernet.state()
    for subnet in (supernet.space.largest(), supernet.space.smallest(), sample(norm, 3)):
        arrays = {
            name: np.ascontiguousarray(array)
            for name, array in supernet.slice_map(subnet).extract(state.tensors).items()
        }
        for array in arrays.values():
            array.flags.writeable = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = supernet.attach(subnet, arrays)
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(tensor.data_ptr() == arrays[name].ctypes.data for name, tensor in model.state_dict().items())
        x = images(supernet.resolution(subnet))
        with torch.no_grad():
            torch.testing.assert_close(model(x), supernet(x, subnet), atol=1e-6, rtol=1e-6)
        with pytest.raises(SpaceError, match="needs the tensor 'classifier.bias'"):
            supernet.attach(subnet, {name: array for name, array in arrays.items() if name != "classifier.bias"})
    assert supernet.state().digest() == state.digest()


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_cut_lies_in_one_piece_of_memory_aligned_and_keeps_types(norm):
    supernet = SUPERNETS[norm]
    subnet = sample(norm, 5)
    cut = supernet.cut(subnet, {name: array.astype(np.float64) for name, array in supernet.state().tensors.items()})
    expected = supernet.slice_map(subnet).extract(supernet.shared())
    assert list(cut) == list(expected)
    end = min(tensor.data_ptr() for tensor in cut.values())
    for name, tensor in cut.items():
        assert tensor.data_ptr() % 64 == 0
        assert end <= tensor.data_ptr() < end + 64
        assert tensor.is_contiguous() and tensor.dtype == torch.float64
        torch.testing.assert_close(tensor.float(), expected[name].detach(), atol=1e-6, rtol=1e-6)
        end = tensor.data_ptr() + tensor.numel() * 8


def test_two_modules_of_one_subnet_share_no_state():
    supernet = SUPERNETS["batch"]
    first, second = (supernet.build(supernet.space.smallest()) for _ in range(2))
    own = [{id(value) for module in model.modules() for value in vars(module).values() if isinstance(value, dict | set)}
           for model in (first, second)]  # fmt: skip
    assert own[0].isdisjoint(own[1])
    first.stem.act.register_forward_hook(lambda *_: pytest.fail("a hook of the other module"))
    first.eval()
    second(images(supernet.resolution(supernet.space.smallest())))
    assert second.training and second.stem.norm.training


@some
@given(seeds)
def test_the_shared_gradient_is_the_subnets_gradient_sent_back(seed):
    """Forward's gradient is A^T times the gradient of a built subnet: by slices for weights, by K^T for kernels."""
    supernet, subnet = SUPERNETS["group"].eval(), sample("group", seed)
    x = images(supernet.resolution(subnet), seed=seed)
    model = supernet.build(subnet).eval()
    model(x).square().sum().backward()
    supernet.zero_grad()
    supernet(x, subnet).square().sum().backward()
    arrays = supernet.state().tensors
    parameters = dict(model.named_parameters())
    for name, shared in supernet.network.named_parameters():
        if ".matrix_" in name:
            continue
        if name not in parameters:
            assert shared.grad is None
            continue
        item, gradient = supernet.slice_map(subnet)[name], parameters[name].grad.numpy()
        expected = replace(item, kernel=None).lift(gradient, arrays) if item.kernel is None else None
        if expected is None:
            flat = gradient.reshape(len(gradient), -1) @ item.kernel.operator(arrays)
            full = flat.reshape(len(gradient), *item.shared_shape[1:])
            expected = np.zeros(item.shared_shape)
            order = item.index[0]
            expected[order] = full
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(shared.grad.numpy(), expected, atol=1e-4 * scale)


def test_forward_is_differentiable_in_the_kernel_matrices():
    """Against central differences in float64, along a random direction of each matrix."""
    supernet = build_supernet(2).double().eval()
    subnet = supernet.space.subnet(kernel=3)
    x = images(20).double()
    supernet(x, subnet).square().sum().backward()
    for step in ("7to5", "5to3"):
        matrix = supernet.shared()[f"stages.1.0.depthwise.matrix_{step}"]
        direction = torch.randn(matrix.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                matrix.add_(direction, alpha=sign * 1e-5)
                values.append(float(supernet(x, subnet).square().sum()))
                matrix.sub_(direction, alpha=sign * 1e-5)
        slope = float((matrix.grad * direction).sum())
        assert abs(slope) > 1e-6
        assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


def test_a_subnet_with_the_largest_kernel_does_not_touch_the_matrices():
    supernet = build_supernet(2)
    supernet(images(20), supernet.space.largest()).sum().backward()
    grads = [tensor.grad for name, tensor in supernet.network.named_parameters() if ".matrix_" in name]
    assert grads
    assert grads == [None] * len(grads)


@some
@given(seeds)
def test_forward_in_training_mode_uses_the_batch_and_leaves_the_shared_statistics(seed):
    supernet, subnet = SUPERNETS["batch"], sample("batch", seed)
    x = images(supernet.resolution(subnet), seed=seed)
    before = supernet.state().digest()
    torch.manual_seed(0)
    trained = supernet.train()(x, subnet)
    assert supernet.state().digest() == before
    torch.manual_seed(0)
    torch.testing.assert_close(trained, supernet.build(subnet).train()(x), atol=1e-6, rtol=1e-6)
    supernet.eval()
    assert not torch.allclose(trained, supernet(x, subnet), atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_group_norm_nests(training):
    """A narrow subnet's inner channels hold what the same channels hold in the largest subnet."""
    supernet = build_supernet(3).train(training)
    name = "stages.1.0.expand"
    seen = {}
    for expand in (1, 2, 3):
        subnet = supernet.space.subnet(expand=expand)
        model = supernet.build(subnet).train(training)
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, expand=expand: seen.update({expand: output})
        )
        model(images(20))
    order = supernet.ordering["stages.1.0.mid"]
    assert seen[3].shape[1] == 24
    shared = torch.empty_like(seen[3])
    shared[:, order] = seen[3]
    for expand in (1, 2):
        torch.testing.assert_close(seen[expand], shared[:, order[: 8 * expand]], atol=1e-6, rtol=1e-6)


def test_a_subnet_of_another_space_is_refused():
    supernet = SUPERNETS["group"]
    wrong = SubnetConfig(supernet.space.family, (("depth", (0, 0)),))
    for use in (supernet.build, supernet.slice_map, lambda subnet: supernet(images(20), subnet)):
        with pytest.raises(SpaceError, match="expected the axes"):
            use(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sizes: {"stages.9.0.mid": np.arange(8)}, "unknown channel group 'stages.9.0.mid'"),
        (lambda sizes: {"stages.1.0.mid": np.zeros(sizes["stages.1.0.mid"], int)}, r"a permutation of 0\.\.23"),
        (lambda sizes: {"stages.1.0.mid": np.arange(8)}, r"'stages.1.0.mid': expected a permutation of 0\.\.23"),
        (lambda sizes: {"stages.1.0.mid": np.arange(1, 25)}, r"a permutation of 0\.\.23"),
        (lambda sizes: {"stages.1.0.mid": np.arange(24).reshape(3, 8)}, r"0\.\.23, found array\(\[\[ 0, 1, 2"),
        (lambda sizes: {"stages.1.0.mid": np.arange(24.0)}, r"a permutation of 0\.\.23, found array\(\[ 0\., 1\."),
        (lambda sizes: {"stages.1.0.mid": None}, r"a permutation of 0\.\.23, found None"),
        (lambda sizes: {"stages.1.0.mid": "abc"}, r"a permutation of 0\.\.23, found 'abc'"),
        (lambda sizes: {"stages.1.0.mid": [[1], [2, 3]]}, r"a permutation of 0\.\.23, found \[\[1\], \[2, 3\]\]"),
    ],
)
def test_an_ordering_that_is_none_is_refused_and_the_old_one_stays(change, message):
    supernet = build_supernet(1)
    before = supernet.state().digest()
    with pytest.raises(SpaceError, match=message):
        supernet.set_ordering(change(supernet.channel_groups()))
    assert supernet.state().digest() == before


def test_a_new_ordering_changes_the_subnets_cut_after_it():
    supernet = build_supernet(1, shuffled=False)
    subnet = supernet.space.smallest()
    first = supernet.slice_map(subnet)["stages.1.0.expand.conv.weight"].extract(supernet.state().tensors)
    order = np.roll(np.arange(24), 8)
    supernet.set_ordering({"stages.1.0.mid": order})
    second = supernet.slice_map(subnet)["stages.1.0.expand.conv.weight"].extract(supernet.state().tensors)
    weight = supernet.state().tensors["stages.1.0.expand.conv.weight"]
    np.testing.assert_array_equal(first, weight[:8])
    np.testing.assert_array_equal(second, weight[order[:8]])


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_state_makes_another_supernet_the_same(norm):
    source, target = SUPERNETS[norm].eval(), build_supernet(9, norm=norm, shuffled=False).eval()
    subnet = sample(norm, 4)
    x = images(source.resolution(subnet))
    state = source.state()
    assert target.state().digest() != state.digest()
    target.load_state(state)
    assert target.state().digest() == state.digest()
    with torch.no_grad():
        assert torch.equal(target(x, subnet), source(x, subnet))
        target.shared()["classifier.bias"].add_(1.0)
    assert source.state().digest() == state.digest(), "a state holds copies"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: tensors.pop("stem.conv.weight"),
            "stem.conv.weight: expected shape (8, 1, 3, 3), found no such tensor",
        ),
        (
            lambda tensors: tensors.update({"stem.extra": np.zeros(1, np.float32)}),
            "stem.extra: expected no such tensor, found shape (1,)",
        ),
        (
            lambda tensors: tensors.update({"classifier.bias": np.zeros(6, np.float32)}),
            "classifier.bias: expected shape (5,), found shape (6,)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_loaded(change, said):
    supernet = build_supernet(1)
    before = supernet.state()
    tensors = {name: array + 1 for name, array in before.tensors.items()}
    change(tensors)
    with pytest.raises(CheckpointError, match=rf": 1 tensors are missing.*: {re.escape(said)}\. Use the supernet"):
        supernet.load_state(replace(before, tensors=tensors))
    assert supernet.state().digest() == before.digest()


def test_a_supernet_of_structure_only_takes_no_state():
    source = build_supernet(1)
    with pytest.raises(CheckpointError, match=r"\(mobilenet_v3\) is structure only.*build it with a generator"):
        build_elastic(source.spec).load_state(source.state())


def test_a_state_whose_ordering_does_not_fit_is_refused_and_nothing_is_loaded():
    supernet = build_supernet(1)
    before = supernet.state()
    tensors = {name: array + 1 for name, array in before.tensors.items()}
    with pytest.raises((SpaceError, CheckpointError)):
        supernet.load_state(replace(before, tensors=tensors, ordering={"no such group": np.arange(8)}))
    assert supernet.state().digest() == before.digest()


def test_with_group_norm_an_ordering_that_tears_groups_apart_is_refused():
    supernet = build_supernet(1)
    with pytest.raises(SpaceError, match="stages.1.0.mid"):
        supernet.set_ordering({"stages.1.0.mid": np.roll(np.arange(24), 1)})


def test_assemble_takes_exactly_the_subnets_tensors():
    supernet = SUPERNETS["batch"]
    subnet = supernet.space.smallest()
    tensors = {item.name: torch.zeros(item.shape) for item in supernet.parameter_table(subnet)}
    model = supernet.assemble(subnet, tensors)
    assert model.state_dict().keys() == tensors.keys()
    assert model.stem.conv.weight.data_ptr() == tensors["stem.conv.weight"].data_ptr()
    with pytest.raises(SpaceError, match="has no tensors .*'extra'"):
        supernet.assemble(subnet, {**tensors, "extra": torch.zeros(1)})
    del tensors["stem.norm.running_var"]
    with pytest.raises(SpaceError, match=r"needs the tensor 'stem\.norm\.running_var'"):
        supernet.assemble(subnet, tensors)


def test_assemble_takes_only_tensors_of_the_subnets_shapes():
    supernet = SUPERNETS["batch"].eval()
    large, small = supernet.space.largest(), supernet.space.subnet(kernel=3)
    arrays = {name: tensor.detach().numpy() for name, tensor in supernet.cut(small).items()}
    message = (
        r"another subnet's: .*depthwise\.conv\.weight: expected shape \(24, 1, 7, 7\), found \(24, 1, 3, 3\); .*give"
    )
    with pytest.raises(SpaceError, match=message):
        supernet.attach(large, arrays)
    statistic = "stem.norm.running_var"
    with pytest.raises(SpaceError, match=r"stem\.norm\.running_var: expected shape \(8,\), found \(9,\); give"):
        supernet.assemble(small, {**supernet.cut(small), statistic: torch.ones(9)})
    wrapped = FixedSupernet(torch.nn.Linear(2, 3), (1, 1, 2))
    with pytest.raises(SpaceError, match=r"weight: expected shape \(3, 2\), found \(3, 1\); give"):
        wrapped.attach(wrapped.space.largest(), {"weight": np.zeros((3, 1)), "bias": np.zeros(3)})


def test_an_ordering_is_copied_and_may_be_any_view():
    supernet = build_supernet(1, norm="batch", shuffled=False).eval()
    subnet, group = supernet.space.smallest(), "stages.1.0.mid"
    order = np.arange(24)
    supernet.set_ordering({group: order[::-1]})
    with torch.no_grad():
        x, expected = images(16), supernet.build(subnet).eval()(images(16))
        torch.testing.assert_close(supernet(x, subnet), expected, atol=1e-6, rtol=1e-6)
        order[:] = np.roll(order, 5)
        supernet.state().ordering[group][:] = 0
        assert supernet.ordering[group].tolist() == list(range(23, -1, -1))
        torch.testing.assert_close(supernet(x, subnet), expected, atol=1e-6, rtol=1e-6)
        order.flags.writeable = False
        supernet.set_ordering({group: order})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            supernet(x, subnet)


def test_freezing_a_skeleton_or_a_structure_freezes_nothing_made_later():
    structure = build_elastic(SPEC)
    for made in (structure, structure.skeleton(structure.space.largest())):
        made.requires_grad_(False)
        for later in (
            structure.skeleton(structure.space.largest()),
            build_elastic(SPEC),
            build_elastic(SPEC, torch.Generator().manual_seed(0)),
        ):
            assert all(parameter.requires_grad for parameter in later.parameters())
    structure.skeleton(structure.space.largest()).half()
    assert {tensor.dtype for tensor in build_elastic(SPEC).shared().values()} == {torch.float32}


def test_skeletons_first_made_in_inference_mode_serve_outside_it():
    spec = replace(SPEC, norm_eps=3e-5, num_classes=3, norm="batch")  # parts that no other test makes
    with torch.inference_mode():
        build_elastic(spec)
    supernet = build_elastic(spec, torch.Generator().manual_seed(0))
    supernet(images(16), supernet.space.largest()).sum().backward()
    assert supernet.shared()["stem.conv.weight"].grad is not None


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def test_weights_are_of_one_type_whatever_torchs_default_is():
    spec = replace(SPEC, norm_eps=4e-5, norm="batch")  # parts that no other test makes
    for default in (torch.float64, torch.float32):
        with default_dtype(default):
            supernet = build_elastic(spec, torch.Generator().manual_seed(0))
            assert {tensor.dtype for tensor in supernet.shared().values()} == {torch.float32}
            subnet = supernet.space.smallest()
            for parametrised in (False, True):
                made = supernet.structure(subnet, parametrised)
                assert {tensor.dtype for tensor in made.state_dict().values()} == {torch.float32}
            assert supernet(images(16).float(), subnet).dtype == torch.float32


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_state_dict_carries_the_ordering_and_the_normalisation(norm, tmp_path):
    source, target = SUPERNETS[norm].eval(), build_supernet(9, norm=norm, shuffled=False).eval()
    subnet, x = source.space.smallest(), images(16)
    source.normalisation = {"mean": np.array([0.5]), "std": [np.float32(0.25)]}
    torch.save(source.state_dict(), tmp_path / "supernet.pth")
    source.normalisation = None
    target.load_state_dict(torch.load(tmp_path / "supernet.pth", weights_only=True))
    assert target.state().digest() == source.state().digest()
    assert target.normalisation == {"mean": [0.5], "std": [0.25]}
    with torch.no_grad():
        assert torch.equal(target(x, subnet), source(x, subnet))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (None, "as its extra state, found None; use"),
        ({"ordering": {}}, "as its extra state, found .*; use"),
        ({"ordering": [1], "normalisation": None}, "as its extra state, found .*; use"),
        ({"ordering": {"x": torch.arange(3)}, "normalisation": None}, "unknown channel group 'x'"),
        ({"ordering": {"stages.1.0.mid": 3}, "normalisation": None}, r"a permutation of 0\.\.23, found 3"),
        ({"ordering": {}, "normalisation": {"mean": [0.5], "std": [0.0]}}, "normalisation: .* std positive"),
    ],
)
def test_a_state_dict_that_carries_something_else_is_refused_and_nothing_is_loaded(extra, message):
    supernet, other = build_supernet(1), build_supernet(2)
    before, weights = supernet.state().digest(), other.state_dict()
    with pytest.raises((CheckpointError, SpaceError), match=message):
        supernet.load_state_dict({**weights, "_extra_state": extra})
    assert supernet.state().digest() == before and supernet.normalisation is None
    del weights["_extra_state"]
    with pytest.raises(RuntimeError, match="Missing key.*_extra_state"):
        supernet.load_state_dict(weights)


def test_a_normalisation_that_is_none_is_not_saved():
    supernet = build_supernet(1)
    supernet.normalisation = {"mean": [0.5], "std": [-1.0]}
    with pytest.raises(
        CheckpointError, match=r"normalisation: expected .* found \{'mean': \[0\.5\], 'std': \[-1\.0\]\}"
    ):
        supernet.state_dict()


def test_a_supernet_of_structure_only_says_so_wherever_weights_are_needed():
    supernet, wrapped = build_elastic(SPEC), FixedSupernet(torch.nn.Linear(2, 3, device="meta"), (1, 1, 2))
    subnet, given_tensors = supernet.space.smallest(), build_supernet(1).shared()
    for use in (
        supernet.state,
        lambda: supernet.cut(subnet),
        lambda: supernet.build(subnet),
        lambda: supernet(images(16), subnet),
        wrapped.state,
        lambda: wrapped(torch.zeros(1, 2), wrapped.space.largest()),
    ):
        with pytest.raises(CheckpointError, match=r"is structure only.*build it with a generator"):
            use()
    assert supernet(images(16).to("meta"), subnet).shape == (3, SPEC.num_classes)
    assert not any(tensor.is_meta for tensor in supernet.build(subnet, given_tensors).state_dict().values())
