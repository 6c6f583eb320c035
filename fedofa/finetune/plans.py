"""Fine-tuning plans by name: from "what should train" to the exact parameters of one subnet."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from fedofa.supernet.costs import BlockCost, in_backward
from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan

KINDS = ("full", "last_blocks(k)", "head", "bias")

MICRO_BATCH_REFUSAL = (
    "micro-batches change what batch norm computes where it takes the batch's own statistics; set "
    "finetune.statistics=frozen, use group norm, or train with micro_batch 0"
)

FEATURE_CACHE_REFUSAL = (
    "cached features would depend on the batch that they were computed in, where batch norm takes the batch's own "
    "statistics; set finetune.statistics=frozen, use group norm, or train with feature_cache=false"
)

_LAST_BLOCKS = re.compile(r"last_blocks\((\d+)\)")


def build_plan(
    name: str,
    blocks: Sequence[BlockCost],
    *,
    recompute: bool = False,
    statistics: str = "batch",
    parametrised: bool = False,
    lean: bool = False,
    micro_batch: int = 0,
    feature_cache: bool = False,
) -> FineTunePlan:
    """The plan of that name for one subnet.

    Args:
        name: "full"; "last_blocks(k)": the last k elastic blocks (all, where the subnet has fewer) and all after
            them; "head": the last block only;
            "bias": every bias (of norms too) and the head, after TinyTL (arXiv 2007.11622).
        blocks: the subnet's blocks, in forward order.
        recompute: checkpoint every elastic block that lies in the backward pass: keep its input only.
        statistics: batch norm's mode, "batch" or "frozen".
        parametrised: whether the blocks are those of the parametrised subnet.
        lean, micro_batch: as in `FineTunePlan`.
        feature_cache: likewise, in plans that train nothing in the first block; the others have nothing to cache.

    Raises:
        ConfigError: for an unknown plan, or for micro-batches or cached features where batch norm takes statistics of
            the batch.
    """
    if statistics not in ("batch", "frozen"):
        raise ConfigError(f"finetune.statistics: expected 'batch' or 'frozen', found {statistics!r}")
    trainable = set(_trainable(name, blocks))
    ordered = tuple(item.name for block in blocks for item in block.parameters if item.name in trainable)
    segments = ()
    if recompute:
        segments = tuple((block.name,) for block in in_backward(blocks, trainable) if is_elastic(block))
    if micro_batch and statistics == "batch" and any(block.num_statistics for block in blocks):
        raise ConfigError(MICRO_BATCH_REFUSAL)
    caches = feature_cache and not any(item.name in trainable for item in blocks[0].parameters)
    if caches and statistics == "batch" and blocks[0].num_statistics:
        raise ConfigError(FEATURE_CACHE_REFUSAL)
    plan = FineTunePlan(name, ordered, segments, statistics, parametrised, lean, micro_batch)
    return replace(plan, feature_cache=caches)


def choose_segments(blocks: Sequence[BlockCost], trainable: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """The checkpointed segments, of uneven length, with which the least is kept at a time.

    What is kept are the segments' inputs and, while one of them runs again, what lies inside it. Blocks are grouped in
    order until a segment would hold more than a bound; the best bound is taken. Segments cover the blocks in the
    backward pass up to the last elastic one.
    """
    chain = list(in_backward(blocks, trainable))
    while chain and not is_elastic(chain[-1]):
        chain.pop()
    bounds = sorted({sum(block.saved_elements for block in chain[:end]) for end in range(1, len(chain) + 1)})
    grouped = (_grouped(chain, bound) for bound in bounds)
    best = min(grouped, key=_kept_at_a_time, default=[])
    return tuple(tuple(block.name for block in segment) for segment in best)


def _grouped(chain: Sequence[BlockCost], bound: int) -> list[list[BlockCost]]:
    """Segments of consecutive blocks that hold at most `bound` values; a larger block is a segment of its own."""
    segments: list[list[BlockCost]] = []
    held = 0
    for block in chain:
        if not segments or held + block.saved_elements > bound:
            segments.append([])
            held = 0
        segments[-1].append(block)
        held += block.saved_elements
    return segments


def _kept_at_a_time(segments: Sequence[Sequence[BlockCost]]) -> int:
    inside = max(sum(block.saved_elements for block in segment) for segment in segments)
    return sum(segment[0].input_elements for segment in segments) + inside


def is_elastic(block: BlockCost) -> bool:
    """Whether the block is one of the repeated ones, not stem or head."""
    return block.name.startswith("stages.")


def _trainable(name: str, blocks: Sequence[BlockCost]) -> list[str]:
    head = [item.name for item in _parametrised(blocks)[-1].parameters]
    match = _LAST_BLOCKS.fullmatch(name.replace(" ", ""))
    if name == "full":
        return [item.name for block in blocks for item in block.parameters]
    if name == "head":
        return head
    if name == "bias":
        biases = [item.name for block in blocks for item in block.parameters if item.name.endswith(".bias")]
        return biases + head
    if match:
        return _last_blocks(int(match[1]), blocks)
    raise ConfigError(f"finetune.plans: unknown plan {name!r}; known: {', '.join(KINDS)}")


def _last_blocks(count: int, blocks: Sequence[BlockCost]) -> list[str]:
    candidates = [block for block in blocks if is_elastic(block)] or list(_parametrised(blocks))
    if count < 1:
        raise ConfigError(f"finetune.plans: expected last_blocks(1) or more, found last_blocks({count})")
    start = blocks.index(candidates[-min(count, len(candidates))])
    return [item.name for block in blocks[start:] for item in block.parameters]


def _parametrised(blocks: Sequence[BlockCost]) -> list[BlockCost]:
    return [block for block in blocks if block.parameters]
