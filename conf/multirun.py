"""Hydra's multirun over these settings: one task for every combination of the swept values, in a folder of its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from conf.compose import explain
from fedofa.types.errors import ConfigError

SWEEPS_DIR = Path("runs/sweeps")
_SAME_RESULTS = ("hydra", "output_dir", "resume", "resume_round", "runtime", "tracking", "data.path", "data.cache_dir")
"""Settings, or groups of them, that do not change what a run computes; a run's name is the same whatever they are."""
_NAME_CHARACTERS = 120


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Overrides in Hydra's grammar: `rounds=5`, `seed=0,1`, `finetune=glob(*)`, `~evaluation`.

    Raises:
        ConfigError: with the override that cannot be read.
    """
    parsed = []
    for text in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            raise ConfigError(f"{text!r} is no setting: {str(error).strip().splitlines()[0]}") from error
    return parsed


def key_of(override: Override) -> str:
    """The setting that an override speaks of, without `+`, `++` or `~`."""
    return override.get_key_element().lstrip("+~")


def run_name(overrides: Sequence[str], swept: Sequence[str]) -> str:
    """The folder name of a run: its values of the swept settings, by key, and a digest of its other settings.

    Settings that change no result take no part, nor does the order in which settings were given. Characters that file
    names should not have become "_", and long names are cut; such names end in a digest of all settings.
    """
    settings = {override.get_key_element().lstrip("+"): override for override in parse_overrides(overrides)}
    texts = {
        key: f"{key}={override.get_value_element_as_str()}"
        for key, override in sorted(settings.items())
        if not any(key == other or key.startswith((f"{other}.", f"{other}/")) for other in _SAME_RESULTS)
    }
    text = ",".join(value for key, value in texts.items() if key in swept)
    name = re.sub(r"[^\w.,=+-]", "_", text, flags=re.ASCII)[:_NAME_CHARACTERS]
    if name == text and set(texts) <= set(swept):
        return name or "defaults"
    digest = hashlib.sha256(",".join(texts.values()).encode()).hexdigest()[:8]
    return f"{name}-{digest}".lstrip("-")


def sweep_dir(overrides: Sequence[str]) -> Path:
    """Where a sweep's runs go: `hydra.sweep.dir`, or a folder named after the settings that are swept."""
    parsed = parse_overrides(overrides)
    for override in parsed:
        if override.key_or_group == "hydra.sweep.dir":
            return Path(str(override.value()))
    return SWEEPS_DIR / (re.sub(r"[^\w.+-]", "_", "+".join(_swept(parsed)), flags=re.ASCII) or "sweep")


def _swept(overrides: Sequence[Override]) -> list[str]:
    return sorted(key_of(override) for override in overrides if override.is_sweep_override())


def multirun(overrides: Sequence[str], task: Callable[[DictConfig, Path], Any]) -> list[Any]:
    """Compose every combination of the swept values and hand them to Hydra's launcher.

    Args:
        task: is called with each composed configuration and the folder of its run, in this process or one that the
            launcher started. It must not raise: Hydra would not tell the other runs' results.

    Returns:
        What `task` returned, in the order of the combinations.

    Raises:
        ConfigError: before anything runs, naming the key or the option.
    """
    parsed = parse_overrides(overrides)
    for override in parsed:
        if override.key_or_group == "output_dir":
            raise ConfigError("output_dir: in a sweep every run has its own folder; choose theirs with hydra.sweep.dir")
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise ConfigError(f"{key_of(override)}: an interval has no end of values; `fedofa sweep` searches in it")
    settings = [*overrides, f"hydra.sweep.dir='{sweep_dir(overrides)}'"]
    try:
        GlobalHydra.instance().clear()
        with initialize_config_module("conf", version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            run = partial(_call, task=task, swept=_swept(parsed))
            batches = hydra.multirun("config", run, settings) if hydra else []
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error)) from error
    return [job.return_value for batch in batches for job in batch]


def _call(composed: DictConfig, *, task: Callable[[DictConfig, Path], Any], swept: Sequence[str]) -> Any:
    hydra = HydraConfig.get()
    return task(composed, Path(hydra.sweep.dir) / run_name([str(item) for item in hydra.overrides.task], swept))


def num_parallel_runs() -> int:
    """How many runs the launcher of the present sweep has going at a time: 1, or joblib's `hydra.launcher.n_jobs`."""
    num_jobs = HydraConfig.get().launcher.get("n_jobs", 1)
    if num_jobs == 1:
        return 1
    from joblib import effective_n_jobs

    return int(effective_n_jobs(num_jobs))


def _explain(error: Exception) -> str:
    text = explain(error)
    if text.startswith("hydra/launcher/joblib: no such option"):
        return f"{text}; joblib's comes with the extra `sweeps`: pip install 'fedofa[sweeps]'"
    return text
