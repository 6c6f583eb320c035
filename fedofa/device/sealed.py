"""JSON objects with a format and a checksum: what profiles and latency tables are on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fedofa.types.errors import ProfileError


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its checksum."""
    return {**content, "checksum": _checksum(content)}


def unseal(value: Any, form: str, where: str, remedy: str) -> dict[str, Any]:
    """The object without its checksum; one that was written by hand may have none.

    Args:
        value: what was read.
        form: the `format` that it has to state.
        where: the file, for errors.
        remedy: what to do about a damaged one.

    Raises:
        ProfileError: when it is no such object or damaged.
    """
    if not isinstance(value, Mapping) or value.get("format") != form:
        found = value.get("format") if isinstance(value, Mapping) else value
        raise ProfileError(f"{where}: expected an object of format {form!r}, found {found!r:.80}")
    content = {key: item for key, item in value.items() if key != "checksum"}
    if "checksum" in value and value["checksum"] != _checksum(content):
        raise ProfileError(f"{where} is damaged: its checksum does not match; {remedy}")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
