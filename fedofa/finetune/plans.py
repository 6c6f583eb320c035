"""Fine-tuning plans by name: from "what should train" to the exact parameters of one subnet."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from fedofa.finetune.sparse import Contributions
from fedofa.supernet.costs import BlockCost, in_backward
from fedofa.supernet.network import ParameterSpec, is_lite
from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan

KINDS = ("full", "last_blocks(k)", "head", "bias", "lite_residual", "sparse(f)", "lora(r)")

MICRO_BATCH_REFUSAL = (
    "micro-batches change what batch norm computes where it takes the batch's own statistics; set "
    "finetune.statistics=frozen, use group norm, or train with micro_batch 0"
)

FEATURE_CACHE_REFUSAL = (
    "cached features would depend on the batch that they were computed in, where batch norm takes the batch's own "
    "statistics; set finetune.statistics=frozen, use group norm, or train with feature_cache=false"
)

_LAST_BLOCKS = re.compile(r"last_blocks\((\d+)\)")
_SPARSE = re.compile(r"sparse\((\d*\.?\d+)\)")
_LORA = re.compile(r"lora\((\d+)\)")


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
    contributions: Contributions | None = None,
) -> FineTunePlan:
    """The plan of that name for one subnet.

    Args:
        name: "full"; "last_blocks(k)": the last k elastic blocks (all, where the subnet has fewer) and all after
            them; "head": the last block only;
            "bias": every bias (of norms too) and the head, after TinyTL (arXiv 2007.11622);
            "lite_residual": those and the lite residual branches, after the same; "sparse(f)": the head, and
            the biases and weights that contribute most within a fraction f of the memory that training all takes (see
            `sparse`); "lora(r)": factors of rank r for every linear and pointwise weight (arXiv 2106.09685).
        blocks: the subnet's blocks, in forward order.
        recompute: checkpoint every elastic block that lies in the backward pass: keep its input only.
        statistics: batch norm's mode, "batch" or "frozen".
        parametrised: whether the blocks are those of the parametrised subnet.
        lean, micro_batch: as in `FineTunePlan`.
        feature_cache: likewise, in plans that train nothing in the first block; the others have nothing to cache.
        contributions: of the supernet's layers; only "sparse" needs them.

    Raises:
        ConfigError: for an unknown plan, for micro-batches or cached features where batch norm takes statistics of the
            batch, or where "sparse" lacks contributions.
    """
    if statistics not in ("batch", "frozen"):
        raise ConfigError(f"finetune.statistics: expected 'batch' or 'frozen', found {statistics!r}")
    plain = name.replace(" ", "")
    fractions, low_rank, rank = {}, set(), 0
    if parametrised and (_SPARSE.fullmatch(plain) or _LORA.fullmatch(plain)):
        raise ConfigError(f"finetune.plans: {name!r} trains no kernel matrices; take another plan for shrinking")
    if match := _SPARSE.fullmatch(plain):
        trainable, fractions = _sparse(name, float(match[1]), blocks, contributions)
    elif match := _LORA.fullmatch(plain):
        trainable, low_rank, rank = set(), {item.name for item in _matrices(blocks)}, _rank(int(match[1]))
    else:
        trainable = set(_trainable(name, blocks))
    names = [item.name for block in blocks for item in block.parameters]
    ordered = tuple(item for item in names if item in trainable)
    parts = tuple((item, fractions[item]) for item in names if item in fractions)
    products = tuple(item for item in names if item in low_rank)
    segments = ()
    if recompute:
        backward = in_backward(blocks, trainable | low_rank)
        segments = tuple((block.name,) for block in backward if is_elastic(block))
    if micro_batch and statistics == "batch" and any(block.num_statistics for block in blocks):
        raise ConfigError(MICRO_BATCH_REFUSAL)
    caches = feature_cache and not any(item.name in trainable | low_rank for item in blocks[0].parameters)
    if caches and statistics == "batch" and blocks[0].num_statistics:
        raise ConfigError(FEATURE_CACHE_REFUSAL)
    levers = {"lean": lean, "micro_batch": micro_batch, "feature_cache": caches}
    sets = {"fractions": parts, "low_rank": products, "rank": rank}
    return FineTunePlan(name, ordered, segments, statistics, parametrised, **levers, **sets)


def needs_contributions(names: Iterable[str]) -> bool:
    """Whether any of the plans of these names is made from contributions."""
    return any(_SPARSE.fullmatch(name.replace(" ", "")) for name in names)


def has_low_rank(names: Iterable[str]) -> bool:
    """Whether any of the plans of these names trains factors of low rank."""
    return any(_LORA.fullmatch(name.replace(" ", "")) for name in names)


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
    if name == "lite_residual":
        return _lite_residual(blocks) + head
    if match:
        return _last_blocks(int(match[1]), blocks)
    raise ConfigError(f"finetune.plans: unknown plan {name!r}; known: {', '.join(KINDS)}")


def _lite_residual(blocks: Sequence[BlockCost]) -> list[str]:
    names = [item.name for block in blocks for item in block.parameters]
    if not any(map(is_lite, names)):
        raise ConfigError(
            "finetune.plans: 'lite_residual' trains branches that this supernet does not have; set "
            "supernet.lite_residual=true, or take another plan"
        )
    return [name for name in names if is_lite(name) or name.endswith(".bias")]


def _sparse(
    name: str, fraction: float, blocks: Sequence[BlockCost], contributions: Contributions | None
) -> tuple[set[str], dict[str, float]]:
    """What trains, and of which weights a fraction."""
    if not 0 < fraction <= 1:
        raise ConfigError(f"finetune.plans: expected sparse(f) with f in (0, 1], found {name!r}")
    if contributions is None:
        raise ConfigError(f"finetune.plans: {name!r} is chosen by contributions, which were not measured")
    choice = contributions.choice(fraction)
    biases = [block for block in blocks if block.name in choice.blocks]
    trainable = {item.name for block in biases for item in block.parameters if item.name.endswith(".bias")}
    present = {item.name for block in blocks for item in block.parameters}
    chosen = {weight: part for weight, part in choice.fractions if weight in present}
    trainable |= chosen.keys() | {item.name for item in _parametrised(blocks)[-1].parameters}
    return trainable, {weight: part for weight, part in chosen.items() if part < 1}


def _matrices(blocks: Sequence[BlockCost]) -> Iterator[ParameterSpec]:
    """The weights of linear layers and pointwise convolutions."""
    for block in blocks:
        for item in block.parameters:
            if (
                item.role == "weight"
                and len(item.shape) in (2, 4)
                and item.shape[1] > 1
                and item.numel == (item.shape[0] * item.shape[1])
            ):
                yield item


def _rank(rank: int) -> int:
    if rank < 1:
        raise ConfigError(f"finetune.plans: expected lora(1) or more, found lora({rank})")
    return rank


def _last_blocks(count: int, blocks: Sequence[BlockCost]) -> list[str]:
    candidates = [block for block in blocks if is_elastic(block)] or list(_parametrised(blocks))
    if count < 1:
        raise ConfigError(f"finetune.plans: expected last_blocks(1) or more, found last_blocks({count})")
    start = blocks.index(candidates[-min(count, len(candidates))])
    return [item.name for block in blocks[start:] for item in block.parameters]


def _parametrised(blocks: Sequence[BlockCost]) -> list[BlockCost]:
    return [block for block in blocks if block.parameters]
