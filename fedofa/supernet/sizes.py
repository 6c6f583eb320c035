"""Which settings make no network: the smallest that each size of a spec may be, in one table, and what is no flag."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fedofa.supernet.network import GROUP_NORM_CHANNELS, NORMS
from fedofa.types.errors import ConfigError

_LISTS = ("blocks", "stages", "kernels", "expands", "fractions", "depths", "widths", "resolutions")
"""Settings that need at least one value."""

_LEAST = {
    "in_channels": 1,
    "num_classes": 1,
    "stem_width": 1,
    "stem_kernel": 1,
    "stem_stride": 1,
    "first_width": 1,
    "first_stride": 1,
    "final_width": 1,
    "feature_width": 1,
    "kernels": 1,
    "depths": 1,
    "min_depth": 1,
    "resolutions": 1,
    "width": 1,
    "kernel": 1,
    "stride": 1,
    "blocks": 1,
}
"""Whole numbers, and the smallest that each may be where a spec does not allow less."""

_FLAGS = ("stem_pool", "squeeze_excite", "lite_residual")
_POSITIVE = ("expand", "expands", "fractions", "widths", "norm_eps")
_ODD = ("kernel", "kernels", "stem_kernel")


def check_sizes(spec: Any, even: Sequence[str], least: Mapping[str, int] | None = None) -> None:
    """Make tuples of an `ElasticSpec`'s lists, and refuse settings that make no network.

    Args:
        spec: being made, which is why a frozen one may still change.
        even: settings whose channel counts must be multiples of 8; of blocks and stages it is their widths.
        least: where the spec allows less than others do.

    Raises:
        ConfigError: naming the setting.
    """
    for item in fields(spec):
        if isinstance(getattr(spec, item.name), list):
            object.__setattr__(spec, item.name, tuple(getattr(spec, item.name)))
    if spec.norm not in NORMS:
        raise ConfigError(f"supernet.norm: expected one of {list(NORMS)}, found {spec.norm!r}")
    if not (_is_number(spec.dropout) and 0 <= spec.dropout < 1):
        raise ConfigError(f"supernet.dropout: expected a number in [0, 1), found {spec.dropout!r}")
    for name in _LISTS:
        values = getattr(spec, name, (None,))
        if not isinstance(values, tuple):
            raise ConfigError(f"supernet.{name}: expected a list, found {values!r:.80}")
        if not values:
            raise ConfigError(f"supernet.{name}: expected at least one value, found none")
    for name, kind in spec.nested.items():
        strange = [item for item in _values(spec, name) if not isinstance(item, kind)]
        if strange:
            raise ConfigError(
                f"supernet.{name}: expected {[item.name for item in fields(kind)]}, found {strange[0]!r:.80}"
            )
    check_numbers(spec, "supernet.", least)
    widths = [getattr(item, "width", item) for name in even for item in _values(spec, name)]
    uneven = [width for width in widths if width % GROUP_NORM_CHANNELS]
    if uneven:
        raise ConfigError(f"supernet widths must be multiples of {GROUP_NORM_CHANNELS}, found {uneven}")


def check_numbers(sizes: Any, where: str, least: Mapping[str, int] | None = None) -> None:
    """Refuse numbers of a dataclass that are too small, no whole ones, or even where they must be odd, and odd flags.

    Args:
        sizes: its settings are known by name; those that are dataclasses themselves have been checked.
        where: goes before the setting's name in an error.
        least: where less is allowed than the table says.

    Raises:
        ConfigError: naming the setting.
    """
    lowest = {**_LEAST, **(least or {})}
    for name in (item.name for item in fields(sizes) if item.name not in getattr(sizes, "nested", {})):
        found = getattr(sizes, name)
        if name in lowest:
            check_whole(f"{where}{name}", found, lowest[name])
        elif name in _POSITIVE:
            bad = [n for n in _values(sizes, name) if not (_is_number(n) and 0 < n < math.inf)]
            if bad:
                raise ConfigError(
                    f"{where}{name}: expected {_some(found, 'positive number')}, found {_shown(found, bad)}"
                )
        elif name in _FLAGS and not isinstance(found, bool):
            raise ConfigError(f"{where}{name}: expected true or false, found {found!r:.80}")
        if name in _ODD:
            even = [size for size in _values(sizes, name) if size % 2 == 0]
            if even:
                raise ConfigError(f"{where}{name}: kernel sizes must be odd, found {even}")


def check_whole(where: str, found: Any, least: int) -> None:
    """Refuse a setting that is no whole number, or a tuple that has others in it, or one that is too small.

    Raises:
        ConfigError: beginning with `where`.
    """
    values = found if isinstance(found, tuple) else (found,)
    bad = [n for n in values if not (isinstance(n, int) and not isinstance(n, bool) and n >= least)]
    if bad:
        raise ConfigError(
            f"{where}: expected {_some(found, 'whole number')} of at least {least}, found {_shown(found, bad)}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _values(sizes: Any, name: str) -> tuple[Any, ...]:
    value = getattr(sizes, name)
    return value if isinstance(value, tuple) else (value,)


def _some(found: Any, kind: str) -> str:
    return f"{kind}s" if isinstance(found, tuple) else f"a {kind}"


def _shown(found: Any, bad: Sequence[Any]) -> str:
    return f"{list(bad)!r:.200}" if isinstance(found, tuple) else f"{found!r:.80}"
