"""From YAML groups and overrides to a checked configuration, with errors that name the key."""

from __future__ import annotations

import copy
import difflib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import lru_cache
from typing import Any, cast, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import SOURCES, SUPERNETS, DataConf, SimulateConf
from fedofa.types.errors import ConfigError


def compose_conf(overrides: Sequence[str] = ()) -> SimulateConf:
    """Compose `config.yaml` with Hydra overrides ("rounds=5", "data=cifar10") and check it.

    Raises:
        ConfigError: naming the key that is unknown or has the wrong type.
    """
    try:
        GlobalHydra.instance().clear()
        with initialize_config_module("conf", version_base="1.3"):
            composed = compose("config", list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error)) from error
    return check_conf(composed)


def check_conf(composed: DictConfig) -> SimulateConf:
    """Hold a composed configuration against the schema.

    Raises:
        ConfigError: naming the key.
    """
    try:
        family = OmegaConf.select(composed, "supernet.family")
        if family not in SUPERNETS:
            raise ConfigError(f"supernet.family: expected one of {sorted(SUPERNETS)}, found {family!r}")
        supernet = _merged(SUPERNETS[family], composed.supernet, "supernet.")
        source = SOURCES.get(str(OmegaConf.select(composed, "data.name")), DataConf)
        data = _merged(source, OmegaConf.select(composed, "data"), "data.")
        apart = ("supernet", "data", "hydra")
        rest = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in apart])
        checked = _merged(SimulateConf, rest, "")
        checked.data = data
        missing = sorted(
            {*OmegaConf.missing_keys(checked), *(f"supernet.{k}" for k in OmegaConf.missing_keys(supernet))}
        )
        missing.remove("supernet")
        if missing:
            raise ConfigError(f"settings without a value: {', '.join(missing)}; give them as key=value")
        checked.supernet = OmegaConf.to_container(supernet, resolve=True)
        return cast(SimulateConf, OmegaConf.to_object(checked))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error


def _merged(schema: type, given: Any, prefix: str) -> DictConfig:
    structured = OmegaConf.structured(schema)
    try:
        return cast(DictConfig, OmegaConf.merge(structured, given))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, prefix)) from error


def explain(error: Exception, prefix: str = "") -> str:
    """One line out of Hydra's or OmegaConf's error: the key, what was found, and the closest known key or option."""
    cause = error
    while cause.__cause__ is not None and isinstance(cause.__cause__, OmegaConfBaseException):
        cause = cast(Exception, cause.__cause__)
    text = str(error).strip()
    key = getattr(cause, "full_key", None) or _first(r"[Kk]ey '([^']+)'", text) or _first(r"full_key: (\S+)", text)
    reason = str(cause).strip().splitlines()[0]
    group = re.search(r"Could not find '([^']+)'", text)
    if group:
        options = _first(r"(?s)Available options in '[^']+':\n(.*?)(?:\n\S|$)", text) or ""
        return f"{group[1]}: no such option; available: {', '.join(options.split())}"
    if "Config group override" in text:
        groups = "data, partition, fleet, supernet, finetune, aggregation, runtime, tracking"
        return f"a group ({groups}) needs a name: {reason}"
    if key is None:
        return reason
    unknown = "not in struct" in text or "not in '" in text  # Hydra's words, then OmegaConf's
    unknown = unknown or "is not in struct" in reason
    hint = _closest(key) if unknown else ""
    return f"{prefix}{key}: {'unknown setting' if unknown else reason}{hint}"


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _closest(key: str) -> str:
    if key in known_keys():
        return f"; {key.partition('.')[0]} of another kind has it"
    close = difflib.get_close_matches(key, sorted(known_keys()), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "; `fedofa settings` prints all of them"


@lru_cache(maxsize=1)
def known_keys() -> frozenset[str]:
    """Every dotted key of the schema."""
    keys = set(_dotted(SimulateConf, ""))
    for prefix, schemas in (("supernet.", SUPERNETS), ("data.", SOURCES)):
        for schema in schemas.values():
            keys |= set(_dotted(schema, prefix))
    return frozenset(keys)


def _dotted(schema: type, prefix: str) -> Iterator[str]:
    for name, kind in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        if is_dataclass(kind):
            yield from _dotted(cast(type, kind), f"{prefix}{name}.")


def encode_conf(conf: SimulateConf) -> str:
    """The configuration as a JSON string, the form in which it travels in Flower's run config (scalars only)."""
    return json.dumps(OmegaConf.to_container(OmegaConf.structured(conf), resolve=True), sort_keys=True)


def load_conf(run_config: Mapping[str, Any]) -> SimulateConf:
    """The configuration of a Flower app from its run config: `config` (JSON), else `overrides` (one string)."""
    return copy.deepcopy(_load_conf(str(run_config.get("config", "")), str(run_config.get("overrides", ""))))


@lru_cache(maxsize=4)
def _load_conf(config: str, overrides: str) -> SimulateConf:
    try:
        settings, words = (json.loads(config) if config else None), shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(f"run config: neither 'config' (JSON) nor 'overrides' can be read: {error}") from error
    if settings is None:
        return compose_conf(words)
    if not isinstance(settings, dict):
        raise ConfigError(f"run config: expected a JSON object under 'config', found {config!r:.80}")
    return check_conf(OmegaConf.create(settings))
