"""Training accuracy predictors from (subnet, accuracy) pairs, and telling how well they rank held-out subnets."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedofa.device.correction import rank_correlation
from fedofa.search.accuracy import DenseLayer, NetworkPredictor
from fedofa.types.encoding import Encoding
from fedofa.types.errors import ConfigError

KINDS = ("mlp", "ridge")
MIN_PAIRS = 10

_HIDDEN, _STEPS, _RATE, _DECAY = 128, 600, 3e-3, 1e-2
_PENALTIES = np.logspace(-3, 3, 25)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How a predictor did on pairs that it was not trained on.

    Args:
        num_train, num_held_out: pairs.
        rank_correlation: Spearman's.
        mean_absolute_error: of the accuracy.
    """

    num_train: int
    num_held_out: int
    rank_correlation: float
    mean_absolute_error: float


def train_predictor(
    encoding: Encoding,
    rows: np.ndarray,
    accuracies: np.ndarray,
    *,
    kind: str,
    held_out_fraction: float,
    seed: int,
) -> tuple[NetworkPredictor, HeldOut]:
    """A predictor that was trained on all pairs but some held-out ones, and how it does on those.

    Args:
        encoding: of the space.
        rows: subnets `(num_pairs, num_columns)`.
        accuracies: theirs, `(num_pairs,)`.
        kind: "mlp": two hidden layers of 128; "ridge": linear, its penalty chosen by leave-one-out errors.
        held_out_fraction: of the pairs.
        seed: of the split and of the first weights.

    Raises:
        ConfigError: for an unknown kind, too few pairs, or accuracies that are no finite numbers.
    """
    _check(kind, accuracies, held_out_fraction)
    order = np.random.default_rng(seed).permutation(len(rows))
    held = max(round(held_out_fraction * len(rows)), 2)
    test, train = order[:held], order[held:]
    features = encoding.one_hot(rows)
    fit = _fit_mlp if kind == "mlp" else _fit_ridge
    predictor = NetworkPredictor(encoding.space, *fit(features[train], accuracies[train], seed))
    predicted = predictor.predict_features(features[test])
    error = float(np.mean(np.abs(predicted - accuracies[test])))
    return predictor, HeldOut(len(train), held, rank_correlation(predicted, accuracies[test]), error)


def _check(kind: str, accuracies: np.ndarray, held_out_fraction: float) -> None:
    if kind not in KINDS:
        raise ConfigError(f"kind: expected one of {list(KINDS)}, found {kind!r}")
    if len(accuracies) < MIN_PAIRS:
        raise ConfigError(
            f"pairs: expected at least {MIN_PAIRS} of them, found {len(accuracies)}; evaluate more subnets"
        )
    if not np.isfinite(accuracies).all():
        raise ConfigError(f"pairs: accuracy {int(np.argmin(np.isfinite(accuracies)))} is not a finite number")
    if not 0 < held_out_fraction < 1:
        raise ConfigError(f"held_out_fraction: expected a fraction in (0, 1), found {held_out_fraction}")


def _fit_ridge(features: np.ndarray, accuracies: np.ndarray, seed: int) -> tuple[list[DenseLayer], float]:
    """Ridge regression on centred features; of the penalties the one of least leave-one-out error."""
    centre, mean = features.mean(axis=0), float(accuracies.mean())
    left, singular, right = np.linalg.svd((features - centre).astype(np.float64), full_matrices=False)
    aim = left.T @ (accuracies - mean)
    errors = []
    for penalty in _PENALTIES:
        shrink = singular**2 / (singular**2 + penalty)
        leverage = (left**2) @ shrink + 1 / len(features)
        residual = accuracies - mean - left @ (shrink * aim)
        errors.append(np.mean((residual / np.maximum(1 - leverage, 1e-6)) ** 2))
    penalty = _PENALTIES[int(np.argmin(errors))]
    weight = right.T @ (singular / (singular**2 + penalty) * aim)
    offset = mean - float(centre @ weight)
    return [DenseLayer(weight[None].astype(np.float32), np.zeros(1, np.float32))], offset


def _fit_mlp(features: np.ndarray, accuracies: np.ndarray, seed: int) -> tuple[list[DenseLayer], float]:
    """Full-batch AdamW with a cosine, on accuracies of mean 0 and deviation 1."""
    mean, deviation = float(accuracies.mean()), float(accuracies.std()) or 1.0
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        sizes = (features.shape[1], _HIDDEN, _HIDDEN, 1)
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    network = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])
    x, y = torch.from_numpy(features), torch.from_numpy((accuracies - mean) / deviation).float()
    optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    for _ in range(_STEPS):
        optimiser.zero_grad()
        functional.mse_loss(network(x)[:, 0], y).backward()
        optimiser.step()
        schedule.step()
    layers = [DenseLayer(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]
    last = DenseLayer(layers[-1].weight * deviation, layers[-1].bias * deviation)
    return [*layers[:-1], last], mean
