"""What crosses the wire between server and client, on top of the packed codec: tasks down, deltas and statistics up."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedofa.types.delta import LowRank, SubnetDelta
from fedofa.types.errors import FedofaError, WireError
from fedofa.types.plan import FineTunePlan
from fedofa.types.space import SubnetConfig
from fedofa.types.statistics import ChannelSums, SubnetStatistics
from fedofa.update.codec import decode_packed, encode_packed

FLOAT_DTYPES = ("float32", "float16", "bfloat16")
"""How parameters may travel."""

_TASK, _DELTA, _STATISTICS = "task", "delta", "statistics"
_GRAPH, _WEIGHTS, _TEACHER, _TOTALS, _SQUARES = "graph", "weights", "teacher", "totals", "squares"
_LEFT, _RIGHT = "left", "right"
_MAX_GRAPH_BYTES = 64 << 20
_TASK_TYPES = {"round": int, "version": int, "supernet": dict, "training": dict, "normalisation": dict, "seed": int}
_DELTA_TYPES = {"client_id": str, "plan_digest": str, "round": int, "base_version": int, "num_examples": int,
                "num_steps": int, "parametrised": bool}  # fmt: skip
_STATISTICS_TYPES = {"client_id": str, "round": int, "base_version": int, "num_examples": int}


@dataclass(frozen=True, slots=True)
class Teaching:
    """A frozen subnet that a client's subnet learns from.

    Args:
        subnet: the teacher's configuration, in its plain form.
        tensors: its tensors by name, with the statistics that it is evaluated with.
        loss: the settings of `fedofa.shrinking.schedule.TeacherLoss`.
        label_weight, teacher_weight: of the two losses.
    """

    subnet: SubnetConfig
    tensors: Mapping[str, np.ndarray]
    loss: Mapping[str, Any]
    label_weight: float
    teacher_weight: float


@dataclass(frozen=True, slots=True)
class ClientTask:
    """What a client is asked to do with a subnet: the same bytes for every client that gets the same subnet.

    Args:
        round: the server's round, from 1.
        version: of the shared state that the weights come from.
        subnet, plan: what to train and how.
        supernet: description of the supernet's structure (`Supernet.description`).
        training: the settings of `LocalTraining`.
        normalisation: per-channel "mean" and "std" of pixels in [0, 1].
        seed: of the run; with round and client id it seeds the client's draws.
        float_dtype: how the delta's values travel: "float32", "float16" or "bfloat16".
        teaching: a teacher beside the labels; None for the labels alone.
        graph: a compiled step for clients without torch, whose tensors travel in the weights' place; None for others.
    """

    round: int
    version: int
    subnet: SubnetConfig
    plan: FineTunePlan
    supernet: Mapping[str, Any]
    training: Mapping[str, Any]
    normalisation: Mapping[str, list[float]]
    seed: int
    float_dtype: str = "float32"
    teaching: Teaching | None = None
    graph: bytes | None = None


def encode_task(task: ClientTask, tensors: Mapping[str, np.ndarray]) -> bytes:
    """Pack a task and the subnet's or its graph's tensors, which travel in the task's `float_dtype` too."""
    header = {
        "round": task.round,
        "version": task.version,
        "subnet": task.subnet.to_json(),
        "plan": task.plan.to_json(),
        "supernet": dict(task.supernet),
        "training": dict(task.training),
        "normalisation": dict(task.normalisation),
        "seed": task.seed,
        "float_dtype": task.float_dtype,
    }
    streams = {_WEIGHTS: tensors}
    if task.graph is not None:
        streams[_GRAPH] = {_GRAPH: np.frombuffer(zlib.compress(task.graph), np.uint8)}
    if (teaching := task.teaching) is not None:
        streams[_TEACHER] = teaching.tensors
        weights = {"label_weight": teaching.label_weight, "teacher_weight": teaching.teacher_weight}
        header["teaching"] = {"subnet": teaching.subnet.to_json(), "loss": dict(teaching.loss), **weights}
    return encode_packed(_TASK, header, streams, float_dtype=task.float_dtype)


def decode_task(buffer: bytes | memoryview) -> tuple[ClientTask, Mapping[str, np.ndarray]]:
    """Unpack a task and the received tensors (read-only float32 views of the buffer where it holds float32).

    Raises:
        WireError: when the buffer is damaged or not a task.
    """
    packed = decode_packed(buffer, kind=_TASK)
    header = dict(packed.header)
    try:
        header["subnet"] = SubnetConfig.from_json(header["subnet"])
        header["plan"] = FineTunePlan.from_json(header["plan"])
        if header.get("teaching") is not None:
            header["teaching"] = _teaching(header["teaching"], packed.streams[_TEACHER])
        header["graph"] = _inflated(packed.streams[_GRAPH][_GRAPH]) if _GRAPH in packed.streams else None
        task = ClientTask(**header)
        _check_types("task", task, _TASK_TYPES)
        if task.float_dtype not in FLOAT_DTYPES:
            raise WireError(f"the task's float_dtype: expected one of {list(FLOAT_DTYPES)}, found {task.float_dtype!r}")
        return task, packed.streams.get(_WEIGHTS, {})
    except (KeyError, TypeError, ValueError, FedofaError) as error:
        raise WireError(
            f"the task's header is not understood: {error}; do server and client run the same release?"
        ) from error


def _inflated(packed: np.ndarray) -> bytes:
    inflater = zlib.decompressobj()
    try:
        graph = inflater.decompress(packed.tobytes(), _MAX_GRAPH_BYTES)
    except zlib.error as error:
        raise WireError(f"its graph is damaged: {error}") from error
    if not inflater.eof:
        raise WireError(f"its graph is cut off or has more than {_MAX_GRAPH_BYTES} bytes")
    return graph


def _teaching(value: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Teaching:
    teacher = SubnetConfig.from_json(value["subnet"])
    return Teaching(teacher, tensors, dict(value["loss"]), float(value["label_weight"]), float(value["teacher_weight"]))


def encode_delta(delta: SubnetDelta, *, float_dtype: str = "float32") -> bytes:
    """Pack a client's delta."""
    header = {
        "client_id": delta.client_id,
        "round": delta.round,
        "subnet": delta.subnet.to_json(),
        "plan_digest": delta.plan_digest,
        "base_version": delta.base_version,
        "num_examples": delta.num_examples,
        "num_steps": delta.num_steps,
        "parametrised": delta.parametrised,
    }
    streams = {_WEIGHTS: delta.weights}
    if delta.low_rank:
        streams[_LEFT] = {name: pair.left for name, pair in delta.low_rank.items()}
        streams[_RIGHT] = {name: pair.right for name, pair in delta.low_rank.items()}
    return encode_packed(_DELTA, header, streams, float_dtype=float_dtype)


def decode_delta(buffer: bytes | memoryview) -> SubnetDelta:
    """Unpack a client's delta; only its form is checked here, its content by `verification`.

    Raises:
        WireError: when the buffer is damaged or not a delta.
    """
    packed = decode_packed(buffer, kind=_DELTA)
    header = dict(packed.header)
    try:
        subnet = SubnetConfig.from_json(header.pop("subnet"))
        pairs = _low_rank(packed.streams.get(_LEFT, {}), packed.streams.get(_RIGHT, {}))
        delta = SubnetDelta(subnet=subnet, weights=packed.streams.get(_WEIGHTS, {}), low_rank=pairs, **header)
    except (KeyError, TypeError, FedofaError) as error:
        raise WireError(f"the delta's header is not understood: {error}") from error
    _check_types("delta", delta, _DELTA_TYPES)
    return delta


def _low_rank(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> dict[str, LowRank]:
    if left.keys() != right.keys():
        raise WireError(
            f"its left and right factors are of different weights: {sorted(left.keys() ^ right.keys())[:3]}"
        )
    return {name: LowRank(left[name], right[name]) for name in left}


def encode_statistics(statistics: SubnetStatistics) -> bytes:
    """Pack a client's batch-norm statistics; they travel in float64 whatever the weights travel in."""
    header = {
        "client_id": statistics.client_id,
        "round": statistics.round,
        "subnet": statistics.subnet.to_json(),
        "base_version": statistics.base_version,
        "num_examples": statistics.num_examples,
        "counts": {name: sums.count for name, sums in statistics.sums.items()},
    }
    totals = {name: sums.total for name, sums in statistics.sums.items()}
    squares = {name: sums.squares for name, sums in statistics.sums.items()}
    return encode_packed(_STATISTICS, header, {_TOTALS: totals, _SQUARES: squares})


def decode_statistics(buffer: bytes | memoryview) -> SubnetStatistics:
    """Unpack a client's statistics; only their form is checked here, their content by `verification`.

    Raises:
        WireError: when the buffer is damaged or holds no statistics.
    """
    packed = decode_packed(buffer, kind=_STATISTICS)
    header = dict(packed.header)
    try:
        subnet, counts = SubnetConfig.from_json(header.pop("subnet")), dict(header.pop("counts"))
        totals, squares = packed.streams.get(_TOTALS, {}), packed.streams.get(_SQUARES, {})
        if not counts.keys() == totals.keys() == squares.keys():
            raise WireError("its counts, sums and sums of squares are not of the same norms")
        if not all(isinstance(count, int) and not isinstance(count, bool) for count in counts.values()):
            raise WireError("a count is no whole number")
        sums = {name: ChannelSums(counts[name], totals[name], squares[name]) for name in counts}
        statistics = SubnetStatistics(subnet=subnet, sums=sums, **header)
    except (KeyError, TypeError, ValueError, FedofaError) as error:
        raise WireError(f"the statistics' header is not understood: {error}") from error
    _check_types("statistics", statistics, _STATISTICS_TYPES)
    return statistics


def _check_types(what: str, value: object, types: Mapping[str, type]) -> None:
    for name, kind in types.items():
        found = getattr(value, name)
        if not isinstance(found, kind) or (isinstance(found, bool) and kind is not bool):
            raise WireError(f"the {what}'s {name}: expected {kind.__name__}, found {found!r:.80}")
