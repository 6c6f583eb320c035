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
from importlib.resources import files
from typing import Any, TypeVar, cast, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import (
    SOURCES,
    SUPERNETS,
    DataConf,
    PredictorConf,
    ProfileConf,
    SearchConf,
    ShrinkConf,
    SimulateConf,
)
from fedofa.types.errors import ConfigError

C = TypeVar("C", SimulateConf, ShrinkConf, ProfileConf, SearchConf, PredictorConf)

_COMMANDS: dict[type, str] = {
    ShrinkConf: " shrink",
    ProfileConf: " profile",
    SearchConf: " search",
    PredictorConf: " predictor",
}
"""What follows `fedofa settings` for the settings of each command but `simulate`."""
MAX_SEED = 2**63 - 1
"""Torch takes no larger one."""


def compose_conf(overrides: Sequence[str] = ()) -> SimulateConf:
    """Compose `config.yaml` with Hydra overrides ("rounds=5", "data=cifar10") and check it.

    Raises:
        ConfigError: naming the key that is unknown or has the wrong type.
    """
    return _composed("config", SimulateConf, overrides)


def compose_shrink_conf(overrides: Sequence[str] = ()) -> ShrinkConf:
    """Compose `shrink.yaml` with Hydra overrides ("shrinking=attentive") and check it, as `compose_conf` does."""
    return _composed("shrink", ShrinkConf, overrides)


def compose_profile_conf(overrides: Sequence[str] = ()) -> ProfileConf:
    """Compose `profile.yaml` with Hydra overrides ("engine=onnxruntime") and check it, as `compose_conf` does."""
    return _composed("profile", ProfileConf, overrides)


def compose_search_conf(overrides: Sequence[str] = ()) -> SearchConf:
    """Compose `search.yaml` with Hydra overrides ("latency_ms=20") and check it, as `compose_conf` does."""
    return _composed("search", SearchConf, overrides)


def compose_predictor_conf(overrides: Sequence[str] = ()) -> PredictorConf:
    """Compose `predictor.yaml` with Hydra overrides ("kind=ridge") and check it, as `compose_conf` does."""
    return _composed("predictor", PredictorConf, overrides)


def _composed(primary: str, schema: type[C], overrides: Sequence[str]) -> C:
    try:
        if schema is not SimulateConf:
            _check_known(overrides, schema)
        GlobalHydra.instance().clear()
        with initialize_config_module("conf", version_base="1.3"):
            composed = compose(primary, list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, schema=schema)) from error
    return check_conf(composed, schema)


def check_conf(composed: DictConfig, schema: type[C] = SimulateConf) -> C:
    """Hold a composed configuration against the schema.

    Raises:
        ConfigError: naming the key.
    """
    try:
        family = OmegaConf.select(composed, "supernet.family")
        if family not in SUPERNETS:
            raise ConfigError(f"supernet.family: expected one of {sorted(SUPERNETS)}, found {family!r}")
        supernet = _merged(SUPERNETS[family], composed.supernet, "supernet.", schema)
        rest = OmegaConf.masked_copy(composed, [str(key) for key in composed if _is_plain(str(key), schema)])
        checked = _merged(schema, rest, "", schema)
        if "data" in get_type_hints(schema):
            source = SOURCES.get(str(OmegaConf.select(composed, "data.name")), DataConf)
            checked.data = _merged(source, OmegaConf.select(composed, "data"), "data.", schema)
        if "data" not in get_type_hints(schema) and OmegaConf.is_missing(supernet, "pretrained"):
            supernet.pretrained = None  # a command without data builds the structure only
        missing = sorted(
            {*OmegaConf.missing_keys(checked), *(f"supernet.{k}" for k in OmegaConf.missing_keys(supernet))}
        )
        missing.remove("supernet")
        if missing:
            raise ConfigError(f"settings without a value: {', '.join(missing)}; give them as key=value")
        checked.supernet = OmegaConf.to_container(supernet, resolve=True)
        conf = cast(C, OmegaConf.to_object(checked))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, schema=schema)) from error
    if not 0 <= conf.seed <= MAX_SEED:
        raise ConfigError(f"seed: expected a whole number from 0 to {MAX_SEED}, found {conf.seed}; choose one of these")
    return conf


def _check_known(overrides: Sequence[str], schema: type) -> None:
    """Refuse settings of other commands: a data set or a schedule may state some, which `_is_plain` leaves out."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        name = re.split("[./]", override.key_or_group)[0]
        if name in get_type_hints(schema) or name in (*_groups(schema), "hydra"):
            continue
        if name == override.key_or_group and _is_group(name):
            raise ConfigError(_no_such_group(name, schema))
        raise ConfigError(f"{name}: unknown setting{_closest(name, schema)}")


def _is_plain(key: str, schema: type) -> bool:
    """Whether a key is checked as the schema has it; a data set may state groups that only simulate has."""
    known = schema is SimulateConf or key in get_type_hints(schema)
    return known and key not in ("supernet", "data", "hydra")


def _merged(part: type, given: Any, prefix: str, schema: type) -> DictConfig:
    structured = OmegaConf.structured(part)
    try:
        return cast(DictConfig, OmegaConf.merge(structured, given))
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, prefix, schema)) from error


def explain(error: Exception, prefix: str = "", schema: type = SimulateConf) -> str:
    """One line out of Hydra's or OmegaConf's error: the key, what was found, and the closest known key or option."""
    cause = error
    while cause.__cause__ is not None and isinstance(cause.__cause__, OmegaConfBaseException):
        cause = cast(Exception, cause.__cause__)
    text = str(error).strip()
    key = getattr(cause, "full_key", None) or _first(r"[Kk]ey '([^']+)'", text) or _first(r"full_key: (\S+)", text)
    reason = str(cause).strip().splitlines()[0]
    alien = re.search(r"Could not override '([^']+)'\.(?:\nDid you mean to override (.+)\?)?", text)
    if alien and _is_group(alien[1]):
        return f"{alien[1]}: did you mean {alien[2]}?" if alien[2] else _no_such_group(alien[1], schema)
    group = re.search(r"Could not find '([^']+)'", text)
    if group:
        options = _first(r"(?s)Available options in '[^']+':\n(.*?)(?:\n\S|$)", text) or ""
        return f"{group[1]}: no such option; available: {', '.join(options.split())}"
    if "Config group override" in text:
        return f"a group ({', '.join(_groups(schema))}) needs a name: {reason}"
    if key is None:
        return reason
    unknown = "not in struct" in text or "not in '" in text  # Hydra's words, then OmegaConf's
    unknown = unknown or "is not in struct" in reason
    hint = _closest(f"{prefix}{key}", schema) if unknown else ""
    return f"{prefix}{key}: {'unknown setting' if unknown else reason}{hint}"


def _first(pattern: str, text: str) -> str | None:
    match = re.search(pattern, text)
    return match[1] if match else None


def _groups(schema: type) -> list[str]:
    """The settings that are whole files."""
    found = [name for name in get_type_hints(schema) if _is_group(name)]
    return [*found, "optimiser"] if schema is ShrinkConf else found


def _is_group(name: str) -> bool:
    return (files("conf") / name).is_dir()


def _no_such_group(name: str, schema: type) -> str:
    return f"{name}: no such group here; groups: {', '.join(_groups(schema))}"


def _closest(key: str, schema: type) -> str:
    if key in known_keys(schema):
        return f"; {key.partition('.')[0]} of another kind has it"
    close = difflib.get_close_matches(key, sorted({*known_keys(schema), *_groups(schema)}), n=1, cutoff=0.5)
    command = f"fedofa settings{_COMMANDS.get(schema, '')}"
    return f"; did you mean {close[0]!r}?" if close else f"; `{command}` prints all of them"


@lru_cache(maxsize=8)
def known_keys(schema: type = SimulateConf) -> frozenset[str]:
    """Every dotted key of the schema."""
    keys = set(_dotted(schema, ""))
    groups = [("supernet.", SUPERNETS), *([("data.", SOURCES)] if "data" in keys else [])]
    for prefix, kinds in groups:
        for kind in kinds.values():
            keys |= set(_dotted(kind, prefix))
    return frozenset(keys)


def _dotted(schema: type, prefix: str) -> Iterator[str]:
    for name, kind in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        if is_dataclass(kind):
            yield from _dotted(cast(type, kind), f"{prefix}{name}.")


def encode_conf(conf: SimulateConf | ShrinkConf) -> str:
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
