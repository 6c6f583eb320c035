"""Compiled steps for clients whose engine is ONNX Runtime: which runs can have such clients, and what they are sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec

import numpy as np

from fedofa.finetune.plans import has_low_rank
from fedofa.supernet.base import Supernet
from fedofa.supernet.elastic import ElasticSupernet
from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan
from fedofa.types.space import SubnetConfig

COMPILED = "onnxruntime"
"""The engine whose clients are sent compiled steps."""


def unfit_engines(supernet: Supernet, statistics: str, schedule: str, plans: Iterable[str]) -> dict[str, str]:
    """Engine -> why its clients can take no part in a run.

    Args:
        supernet: of the run.
        statistics: batch norm's mode in training, "batch" or "frozen".
        schedule: of shrinking, "none" without it.
        plans: the names of those that clients may be given.
    """
    has_statistics = any(item.role == "statistic" for item in supernet.slice_map(supernet.space.largest()))
    reasons = {
        "the server compiles their steps; install the extra `onnx` there": find_spec("onnx") is None,
        f"a supernet of family {supernet.space.family!r} cannot be compiled": not isinstance(supernet, ElasticSupernet),
        "compiled steps have no teachers and no kernel matrices; set shrinking=none": schedule != "none",
        "one example at a time gives batch norm no statistics; set finetune.statistics=frozen or use group norm": (
            has_statistics and statistics == "batch"
        ),
        "compiled steps train no factors of low rank; leave lora(r) out of finetune.plans": has_low_rank(plans),
    }
    why = [reason for reason, applies in reasons.items() if applies]
    return {COMPILED: f"engine {COMPILED}: {why[0]}"} if why else {}


def compiled(
    supernet: Supernet, subnet: SubnetConfig, plan: FineTunePlan, tensors: Mapping[str, np.ndarray]
) -> tuple[bytes, dict[str, np.ndarray]]:
    """A subnet's step under a plan and the tensors that it takes; a forward pass where nothing trains.

    Steps are exact and keep little as they are: the plan's levers, lossy ones too, have no part in them.

    Args:
        tensors: the subnet's, with the statistics that it is trained with.

    Raises:
        ConfigError: when the supernet is none of blocks, or the plan trains what compiled steps do not know.
    """
    from fedofa.finetune.onnx_network import compile_step

    if not isinstance(supernet, ElasticSupernet):
        raise ConfigError(f"plan {plan.name!r} on a subnet of {supernet.space.family!r} cannot be compiled")
    step = compile_step(supernet.network_spec(subnet), plan)
    return step.graph, step.feed(tensors)
