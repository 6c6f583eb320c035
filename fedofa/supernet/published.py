"""Names of the published Once-for-All MobileNetV3 files, and reading such weights into a supernet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedofa.supernet.mobilenet_v3 import MobileNetV3Supernet
from fedofa.types.errors import CheckpointError

_PARTS = {
    "expand.conv.weight": "inverted_bottleneck.conv.conv.weight",
    "expand.norm": "inverted_bottleneck.bn.bn",
    "depthwise.conv.weight": "depth_conv.conv.conv.weight",
    "depthwise.norm": "depth_conv.bn.bn",
    "squeeze_excite.reduce.conv": "depth_conv.se.fc.reduce",
    "squeeze_excite.expand.conv": "depth_conv.se.fc.expand",
    "project.conv.weight": "point_linear.conv.conv.weight",
    "project.norm": "point_linear.bn.bn",
}
_STATIC_PARTS = {
    "depthwise.conv.weight": "depth_conv.conv.weight",
    "depthwise.norm": "depth_conv.bn",
    "project.conv.weight": "point_linear.conv.weight",
    "project.norm": "point_linear.bn",
}
_OUTSIDE = {
    "stem.conv.weight": "first_conv.conv.weight",
    "stem.norm": "first_conv.bn",
    "final.conv.weight": "final_expand_layer.conv.weight",
    "final.norm": "final_expand_layer.bn",
    "mix.conv.weight": "feature_mix_layer.conv.weight",
    "classifier": "classifier.linear",
}


def published_names(supernet: MobileNetV3Supernet) -> Iterator[tuple[str, str]]:
    """Pairs (shared name here, key in a published file) for every shared tensor."""
    depth = supernet.spec.depths[-1]
    for name in supernet.shared():
        head, _, rest = name.partition(".")
        if head != "stages":
            yield name, _translate(name, _OUTSIDE)
            continue
        stage, block, part = rest.split(".", 2)
        if stage == "0":
            yield name, f"blocks.0.conv.{_translate(part, _STATIC_PARTS)}"
            continue
        number = 1 + (int(stage) - 1) * depth + int(block)
        if ".matrix_" in part:
            key = f"depth_conv.conv.{part.removeprefix('depthwise.matrix_')}_matrix"
        else:
            key = _translate(part, _PARTS)
        yield name, f"blocks.{number}.conv.{key}"


def _translate(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    raise CheckpointError(f"tensor {name!r} has no counterpart in the published format")


def load_published_weights(supernet: MobileNetV3Supernet, weights: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a published file's `state_dict` into the supernet.

    Raises:
        CheckpointError: listing every key that is missing, unknown or of another shape; then nothing was copied.
    """
    names = dict(published_names(supernet))
    shared = supernet.shared()
    wanted = {theirs: shared[ours] for ours, theirs in names.items()}
    found = {key for key in weights if not key.endswith("num_batches_tracked")}
    problems = [f"missing {key}" for key in sorted(set(wanted) - found)]
    problems += [f"unknown {key}" for key in sorted(found - set(wanted))]
    problems += [
        f"{key}: expected shape {tuple(wanted[key].shape)}, found {tuple(weights[key].shape)}"
        for key in sorted(found & set(wanted))
        if weights[key].shape != wanted[key].shape
    ]
    if problems:
        raise CheckpointError(
            f"the weights do not fit {supernet.space.family}: {len(problems)} problems: {'; '.join(problems[:20])}"
        )
    with torch.no_grad():
        for key, tensor in wanted.items():
            tensor.copy_(weights[key])
