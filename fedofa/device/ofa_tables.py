"""Once-for-All's published latency tables (YAML, one file a resolution) as `LatencyTable`s, and the other way.

A key of theirs is `expanded_conv-input:112x112x16-output:56x56x24-expand:64-kernel:3-stride:2-idskip:0-se:0-hs:0` and
holds `{mean: milliseconds}`. Tables for ProxylessNAS give the expand ratio instead of the inner channels, leave out
squeeze-excite and activation, and count pooling with the classifier.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedofa.device.operators import Operator, OperatorIndex
from fedofa.device.tables import LatencyTable
from fedofa.supernet.network import MBConvSpec
from fedofa.types.errors import ProfileError
from fedofa.types.spaces import MOBILENET_V3, PROXYLESS

_KINDS = {
    MOBILENET_V3: {"stem": "Conv", "final": "Conv_1", "pool": "AvgPool2D", "mix": "Conv_2", "classifier": "Logits"},
    PROXYLESS: {"stem": "Conv", "mix": "Conv_1", "pool": "Logits", "classifier": None},
}


def load_ofa_table(paths: Iterable[Path], index: OperatorIndex, engine: str) -> LatencyTable:
    """The table of a space from published files; operators that no file has are left out.

    Args:
        paths: the files, together one table.
        index: of a MobileNetV3 or ProxylessNAS space.
        engine: what ran it, for people.

    Raises:
        ProfileError: when there is no file, or one is damaged, or none has an operator of the space.
    """
    entries: dict[str, Any] = {}
    names = [str(path) for path in paths]
    if not names:
        raise ProfileError("published latency tables: expected at least one file, found none")
    for name in names:
        entries |= _read(Path(name))
    times = {}
    for operator, key in _keys(index):
        if key is None:
            times[operator.key] = 0.0
        elif key in entries:
            times[operator.key] = _mean(entries[key], key)
    if not any(times.values()):
        raise ProfileError(f"{', '.join(names)}: no operator of this {index.encoding.space.family!r} space is in it")
    return LatencyTable(index.encoding.space.family, engine, 1, f"published format: {', '.join(names)}", times)


def ofa_entries(table: LatencyTable, index: OperatorIndex) -> dict[str, dict[str, float]]:
    """A table of a space in the published format: key -> `{"mean": milliseconds}`."""
    return {key: {"mean": table.milliseconds[operator.key]} for operator, key in _keys(index) if key is not None}


def _keys(index: OperatorIndex) -> Iterable[tuple[Operator, str | None]]:
    """Every operator with its published key; None where it is counted with another."""
    family = index.encoding.space.family
    if family not in _KINDS:
        raise ProfileError(f"published latency tables: expected a family of {sorted(_KINDS)}, found {family!r}")
    if any(isinstance(item.part, MBConvSpec) and item.part.has_lite for item in index.operators):
        raise ProfileError("published latency tables know no lite residual branches; set supernet.lite_residual=false")
    for place, name in enumerate(index.places):
        for number in index.operators_in(place):
            operator = index.operators[number]
            yield operator, _key(operator, name, family, index)


def _key(operator: Operator, place: str, family: str, index: OperatorIndex) -> str | None:
    part = operator.part
    before, after = (_shape(operator.in_side, operator.in_channels), _shape(operator.out_side, operator.out_channels))
    if isinstance(part, MBConvSpec):
        proxyless = family == PROXYLESS
        expand = round(part.mid_channels / part.in_channels) if proxyless else part.mid_channels
        key = f"expanded_conv-input:{before}-output:{after}-expand:{expand}-kernel:{part.kernel}"
        key += f"-stride:{part.stride}-idskip:{part.residual:d}"
        hard = part.activation == "h_swish"
        return key if proxyless else f"{key}-se:{part.squeeze_channels is not None:d}-hs:{hard:d}"
    kind = _KINDS[family][place]
    if kind is None:
        return None
    if kind == "Logits":
        classes = index.operators[index.operators_in(len(index.places) - 1)[0]].out_channels
        return f"Logits-input:{before}-output:{classes}"
    return f"{kind}-input:{before}-output:{after}"


def _shape(side: int, channels: int) -> str:
    return f"{side}x{side}x{channels}"


def _read(path: Path) -> Mapping[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        content = yaml.load(path.read_bytes(), loader)  # a safe loader
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ProfileError(f"{path} cannot be read as a published latency table: {reason:.200}") from error
    if not isinstance(content, Mapping):
        raise ProfileError(f"{path}: expected a mapping of operators to times, found {type(content).__name__}")
    return content


def _mean(entry: Any, key: str) -> float:
    value = entry.get("mean") if isinstance(entry, Mapping) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ProfileError(f"published latency table, {key!r}: expected {{mean: milliseconds}}, found {entry!r:.80}")
    return float(value)
