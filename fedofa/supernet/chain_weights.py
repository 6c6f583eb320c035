"""A pretrained network's tensors put into a described chain: found by name, checked, copied, channels ordered."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedofa.supernet.chain import ChainSupernet
from fedofa.supernet.importance import channel_ordering
from fedofa.supernet.layouts import LAYOUTS
from fedofa.supernet.network import CLASSIFIER_PREFIX, is_lite
from fedofa.supernet.weights_file import listed, value_problem
from fedofa.types.errors import MisfitError

_COUNTER = ".num_batches_tracked"
_SHOWN = 20


def load_weights(
    supernet: ChainSupernet, weights: Mapping[str, Tensor], keys: Mapping[str, str] | None = None, *, head: bool = True
) -> None:
    """Copy a pretrained network's tensors into the supernet; kernel matrices become the identity, channels are ordered.

    Args:
        keys: name here -> name there; None finds the layout that fits best.
        head: False leaves the classifier as it is; that of the weights may have any number of classes, or be missing.

    Raises:
        MisfitError: listing every entry that is missing, unknown, misshapen or damaged; then nothing was copied.
        CheckpointError: when the supernet is structure only.
    """
    supernet.require_weights()
    largest = supernet.network_spec(supernet.space.largest())
    shared = supernet.shared()
    table = closest_keys(supernet, weights) if keys is None else dict(keys)
    problems = _problems(shared, weights, table, head=head)
    if problems:
        found = f"{len(problems)} problems: {listed(problems, _SHOWN)}"
        raise MisfitError(f"the weights do not fit the described network: {found}", problems)
    with torch.no_grad():
        for name, tensor in shared.items():
            if is_lite(name):
                continue
            if ".matrix_" in name:
                tensor.copy_(torch.eye(len(tensor)))
            elif head or not name.startswith(CLASSIFIER_PREFIX):
                tensor.copy_(weights[table[name]])
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in shared.items()}
    supernet.set_ordering(channel_ordering(largest, arrays))


def classes_of(weights: Mapping[str, Tensor], table: Mapping[str, str]) -> int | None:
    """Rows of the classifier among the weights, or None where they have none."""
    classifier = weights.get(table.get(f"{CLASSIFIER_PREFIX}weight", ""))
    return len(classifier) if classifier is not None and classifier.dim() else None


def closest_keys(supernet: ChainSupernet, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The keys of the layout that the weights fit best."""
    shared, largest = supernet.shared(), supernet.network_spec(supernet.space.largest())
    tables = [layout.keys(largest) for layout in LAYOUTS.values()]
    return min(tables, key=lambda table: len(_problems(shared, weights, table, head=True)))


def _problems(
    shared: Mapping[str, Tensor], weights: Mapping[str, Tensor], table: Mapping[str, str], *, head: bool
) -> list[str]:
    """What is missing, unknown, misshapen or damaged, in words."""
    missing, wrong, known = [], [], set()
    classes = classes_of(weights, table)
    for name, expected in _expected_shapes(shared, None if head else classes).items():
        key = table.get(name, "")
        known.add(key)
        if name.endswith(".norm.running_var"):
            known.add(f"{key.rpartition('.')[0]}{_COUNTER}")
        if key in weights:
            wrong += [f"{key}: {why}" for why in (_entry_problem(name, weights[key], expected),) if why]
        elif head or classes or not name.startswith(CLASSIFIER_PREFIX):
            missing.append(f"missing {key or f'a key for {name}'}")
    unknown = [f"unknown {key}" for key in sorted(weights) if key not in known]
    return sorted(missing) + unknown + sorted(wrong)


def _entry_problem(name: str, value: Tensor, expected: tuple[int, ...]) -> str | None:
    found = tuple(value.shape)
    return value_problem(name, value) if found == expected else f"expected shape {expected}, found {found}"


def _expected_shapes(shared: Mapping[str, Tensor], classes: int | None) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a file holds, the classifier's with that many classes where they are given."""
    return {
        name: (classes, *tensor.shape[1:]) if classes and name.startswith(CLASSIFIER_PREFIX) else tuple(tensor.shape)
        for name, tensor in shared.items()
        if ".matrix_" not in name and not is_lite(name)
    }
