"""What accuracy a subnet will have: predictors trained from measured pairs, and a proxy where there are none."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedofa.device.models import Macs, Parameters
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.types.encoding import Encoding
from fedofa.types.errors import CheckpointError
from fedofa.types.space import SearchSpace

FORMAT = "fedofa accuracy predictor 1"


class AccuracyPredictor(ABC):
    """Ranks subnets by the accuracy that they will have."""

    @abstractmethod
    def predict(self, batch: SubnetBatch) -> np.ndarray:
        """A value for every subnet, `(num_subnets,)`; higher is better. Accuracies, but for the proxy."""

    def slopes(self, batch: SubnetBatch) -> np.ndarray:
        """What one-hot features add near every subnet to first order, float32 `(num_subnets, num_features)`.

        Those of a column that a subnet has are told from changing it alone, the others from adding it first.
        """
        encoding = batch.index.encoding
        column = np.searchsorted(encoding.feature_starts, np.arange(encoding.num_features), side="right") - 1
        value = np.arange(encoding.num_features) - encoding.feature_starts[column]
        changed = np.repeat(np.maximum(batch.rows, 0)[:, None], encoding.num_features, axis=1)
        changed[:, np.arange(len(column)), column] = np.minimum(value, encoding.choices[column] - 1)
        reference = np.repeat(self.predict(batch)[:, None], encoding.num_features, axis=1)
        controls = [encoding.control_of(own) for own in column]
        for feature, control in enumerate(controls):
            if control is not None:
                changed[:, feature, control[0]] = np.maximum(changed[:, feature, control[0]], control[1])
        rows = encoding.normalised(changed.reshape(-1, encoding.num_columns))
        reached = self.predict(SubnetBatch(batch.index, rows)).reshape(reference.shape)
        for feature, control in enumerate(controls):
            if control is not None:
                adding = reached[:, encoding.feature_starts[control[0]] + control[1]]
                reference[:, feature] = np.where(batch.rows[:, column[feature]] < 0, adding, reference[:, feature])
        return (reached - reference).astype(np.float32)


@final
class ZeroCostProxy(AccuracyPredictor):
    """Log MACs plus log parameters, the `capacity` of `search.fit`: needs no subnet's accuracy, and is none."""

    def __init__(self, index: OperatorIndex) -> None:
        self._macs, self._parameters = Macs(index), Parameters(index)

    def predict(self, batch: SubnetBatch) -> np.ndarray:
        counts = (np.maximum(model.predict(batch), 1.0) for model in (self._macs, self._parameters))
        return sum((np.log(count) for count in counts), np.zeros(len(batch)))


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """One layer: weight `(out_features, in_features)` and bias `(out_features,)`, float32."""

    weight: np.ndarray
    bias: np.ndarray


@final
class NetworkPredictor(AccuracyPredictor):
    """Dense layers with ReLU between them, on one-hot features; with one layer a linear model.

    Args:
        space: whose subnets it knows.
        layers: the first takes `Encoding.num_features` values, the last gives one.
        offset: added to the result.
    """

    def __init__(self, space: SearchSpace, layers: Sequence[DenseLayer], offset: float = 0.0) -> None:
        self.space = space
        self.layers = tuple(layers)
        self.offset = offset

    def predict(self, batch: SubnetBatch) -> np.ndarray:
        return self.predict_features(batch.index.encoding.one_hot(batch.rows))

    def predict_features(self, features: np.ndarray) -> np.ndarray:
        """The accuracies of encoded subnets, `(num_subnets, num_features)`."""
        x = features
        for number, layer in enumerate(self.layers):
            x = x @ layer.weight.T
            x += layer.bias
            if number < len(self.layers) - 1:
                np.maximum(x, 0, out=x)
        return x[:, 0].astype(np.float64) + self.offset

    def slopes(self, batch: SubnetBatch) -> np.ndarray:
        x, passed = batch.index.encoding.one_hot(batch.rows), list[np.ndarray]()
        for layer in self.layers[:-1]:
            x = x @ layer.weight.T
            x += layer.bias
            passed.append(x > 0)
            np.maximum(x, 0, out=x)
        slopes = np.repeat(self.layers[-1].weight, len(batch), axis=0)
        for layer, passes in zip(self.layers[-2::-1], passed[::-1], strict=True):
            slopes = (slopes * passes) @ layer.weight
        return slopes


def describe_space(space: SearchSpace) -> list[Any]:
    """The axes of a space as JSON, by which a predictor knows that it is used with its own."""
    return [space.family, [[axis.name, list(axis.values), len(axis.controls)] for axis in space.axes]]


def encode_predictor(predictor: NetworkPredictor, fit: Mapping[str, Any]) -> bytes:
    """The content of a predictor's file: safetensors, with the space and how well it did on held-out pairs."""
    tensors = {}
    for number, layer in enumerate(predictor.layers):
        tensors[f"{number}.weight"] = np.ascontiguousarray(layer.weight, np.float32)
        tensors[f"{number}.bias"] = np.ascontiguousarray(layer.bias, np.float32)
    described = json.dumps(describe_space(predictor.space))
    metadata = {"format": FORMAT, "space": described, "offset": repr(predictor.offset), "fit": json.dumps(dict(fit))}
    return save(tensors, metadata)


def load_predictor(path: Path, space: SearchSpace) -> NetworkPredictor:
    """The predictor of a file that `encode_predictor` made, or of a published one (`.pth`, `.pt`).

    Raises:
        CheckpointError: when the file is damaged or of another space.
    """
    if path.suffix in (".pth", ".pt"):
        return load_published_predictor(path, space)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"predictor {path} cannot be read: {error}; `fedofa predictor` makes one") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"predictor {path}: expected {FORMAT!r}, found {metadata.get('format')!r}")
    expected = json.loads(json.dumps(describe_space(space)))
    found = json.loads(metadata["space"])
    if found != expected:
        raise CheckpointError(
            f"predictor {path} is of another space: {found!r:.300} there, {expected!r:.300} here; train one for this "
            "supernet"
        )
    layers = [DenseLayer(tensors[f"{n}.weight"], tensors[f"{n}.bias"]) for n in range(len(tensors) // 2)]
    return NetworkPredictor(space, layers, float(metadata["offset"]))


# -- the published format --------------------------------------------------------------------------------------------


def load_published_predictor(path: Path, space: SearchSpace) -> NetworkPredictor:
    """Once-for-All's accuracy predictor for a space of kernels, expand ratios and resolutions, in both its layouts.

    The tutorial's (`0.weight`, `2.weight`, ...) has the features kernels, expand ratios, resolutions 112 to 224; the
    library's (`layers.0.0.weight`, ..., `base_acc`) has the resolutions first, those of its space.

    Raises:
        CheckpointError: when it is damaged, or its features are not those of this space.
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = dict(state.get("state_dict", state))
        arrays = {str(name): tensor.float().numpy() for name, tensor in state.items()}
    except Exception as error:  # unpickling damaged bytes raises anything
        raise CheckpointError(f"published predictor {path} cannot be read: {error!r:.200}") from error
    base = arrays.pop("base_acc", np.zeros(1, np.float32))
    names = sorted((name for name in arrays if name.endswith("weight")), key=_layer_number)
    layers = [
        DenseLayer(arrays[name], arrays.get(name.replace("weight", "bias"), np.zeros(1, np.float32))) for name in names
    ]
    if len(layers) < 2 or any(layer.weight.ndim != 2 for layer in layers) or layers[-1].weight.shape[0] != 1:
        raise CheckpointError(f"published predictor {path}: expected dense layers, found {sorted(arrays)[:8]}")
    order = _published_features(
        space, layers[0].weight.shape[1], resolution_first="layers.0.0.weight" in arrays, path=path
    )
    first = np.zeros((len(layers[0].weight), Encoding(space).num_features), np.float32)
    for ours, theirs in order:
        first[:, ours] = layers[0].weight[:, theirs]
    return NetworkPredictor(space, [DenseLayer(first, layers[0].bias), *layers[1:]], float(base.ravel()[0]))


def _layer_number(name: str) -> int:
    return int(next((part for part in name.split(".") if part.isdigit()), "0"))


def _published_features(space: SearchSpace, width: int, *, resolution_first: bool, path: Path) -> list[tuple[int, int]]:
    """Pairs of one of our features and the one of theirs that means the same."""
    starts, start = {}, 0
    for axis in space.axes:
        starts[axis.name] = start
        start += len(axis.values) * len(axis.controls)
    if not {"kernel", "expand", "resolution"} <= set(starts):
        raise CheckpointError(f"published predictor {path}: it knows no space of family {space.family!r}")
    sizes = {name: len(space.axis(name).values) * len(space.axis(name).controls) for name in ("kernel", "expand")}
    resolutions = [int(value) for value in space.axis("resolution").values]
    number = width - sum(sizes.values())
    if resolution_first:
        places = list(range(len(resolutions))) if number == len(resolutions) else []
    else:
        places = (
            [(side - 112) // 16 for side in resolutions if side % 16 == 0 and 112 <= side <= 224] if number == 8 else []
        )
    if len(places) != len(resolutions):
        raise CheckpointError(
            f"published predictor {path}: it has {width} features, of which {number} are no kernel or expand ratio of "
            f"this space, and {len(resolutions)} resolutions {resolutions} do not fit them; use the space it was "
            "trained for"
        )
    kernel = number if resolution_first else 0
    offsets = {"kernel": kernel, "expand": kernel + sizes["kernel"]}
    pairs = [(starts[name] + i, offsets[name] + i) for name in offsets for i in range(sizes[name])]
    first = 0 if resolution_first else sum(sizes.values())
    return pairs + [(starts["resolution"] + i, first + place) for i, place in enumerate(places)]
