"""Flower records at the boundary: one packed buffer as one `Array`, small values as a `ConfigRecord`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedofa.types.errors import WireError

_PACKED, _ARRAY, _FACTS, _METRICS = "packed", "buffer", "facts", "metrics"
_STYPE = "fedofa.packed"


def packed_content(buffer: bytes, metrics: Mapping[str, float] | None = None) -> RecordDict:
    """A message content that carries one packed buffer, and metrics where given."""
    array = Array(dtype="uint8", shape=(len(buffer),), stype=_STYPE, data=buffer)
    content = RecordDict({_PACKED: ArrayRecord({_ARRAY: array})})
    if metrics is not None:
        content[_METRICS] = MetricRecord(dict(metrics))
    return content


def packed_buffer(message: Message) -> bytes:
    """The packed buffer of a message.

    Raises:
        WireError: when the message carries none.
    """
    record = message.content.get(_PACKED)
    if not isinstance(record, ArrayRecord) or set(record) != {_ARRAY} or record[_ARRAY].stype != _STYPE:
        raise WireError(f"expected one packed buffer in the message, found the records {sorted(message.content)}")
    return record[_ARRAY].data


def message_metrics(message: Message) -> dict[str, float]:
    """The numbers of a message's metrics, empty where it has none."""
    record = message.content.get(_METRICS)
    if not isinstance(record, MetricRecord):
        return {}
    return {name: float(value) for name, value in record.items() if isinstance(value, int | float)}


def metrics_content(metrics: Mapping[str, float]) -> RecordDict:
    """A message content of metrics only."""
    return RecordDict({_METRICS: MetricRecord(dict(metrics))})


def facts_content(facts: Mapping[str, Any]) -> RecordDict:
    """A message content of JSON values."""
    return RecordDict({_FACTS: ConfigRecord({"json": json.dumps(facts)})})


def message_facts(message: Message) -> dict[str, Any]:
    """The JSON object of a message.

    Raises:
        WireError: when the message carries none.
    """
    record = message.content.get(_FACTS)
    text = record.get("json") if isinstance(record, ConfigRecord) else None
    try:
        facts = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise WireError(f"expected a JSON object in the message, found the records {sorted(message.content)}")
    return facts
