"""What one round costs a device: memory, time and bytes of a subnet trained under a plan.

`AnalyticCostModel` counts; models that measure the target replace it behind the same interface.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from fedofa.supernet.costs import BlockCost, in_backward
from fedofa.types.device import DeviceProfile
from fedofa.types.plan import FineTunePlan

_BYTES = 4
BACKWARD_PASSES = 2
"""A backward pass through a layer costs twice its forward pass: one product for the input, one for the weights."""


@dataclass(frozen=True, slots=True)
class LocalWork:
    """What a device does in one round.

    Args:
        num_examples: in its training set.
        num_samples: examples drawn over all its steps (examples times epochs, or steps times batch size).
        batch_size: examples a step.
        optimiser_slots: values that the optimiser keeps a trainable parameter (1 for SGD with momentum, 2 for AdamW).
        wire_bytes: bytes a value on the wire.
    """

    num_examples: int
    num_samples: int
    batch_size: int
    optimiser_slots: int = 1
    wire_bytes: int = 4


@dataclass(frozen=True, slots=True)
class RoundCost:
    """The cost of one round on one device.

    Args:
        macs: of one forward pass of one example.
        num_parameters: of the subnet.
        training_bytes: peak memory of training above the engine's floor.
        download_bytes, upload_bytes: payload and delta.
        download_seconds, compute_seconds, upload_seconds: parts of the round.
    """

    macs: int
    num_parameters: int
    training_bytes: int
    download_bytes: int
    upload_bytes: int
    download_seconds: float
    compute_seconds: float
    upload_seconds: float

    @property
    def round_seconds(self) -> float:
        """Download, train, upload, one after the other."""
        return self.download_seconds + self.compute_seconds + self.upload_seconds

    @property
    def longest_part(self) -> str:
        """The part of the round that takes the longest: "downlink", "compute" or "uplink"."""
        parts = {"downlink": self.download_seconds, "compute": self.compute_seconds, "uplink": self.upload_seconds}
        return max(parts, key=lambda part: parts[part])


class CostModel(ABC):
    """Prices a subnet and a plan on a device."""

    @abstractmethod
    def cost(
        self,
        blocks: Sequence[BlockCost],
        plan: FineTunePlan,
        profile: DeviceProfile,
        work: LocalWork,
        teacher: Sequence[BlockCost] = (),
    ) -> RoundCost:
        """The cost of one round.

        Args:
            blocks: the subnet's, in forward order.
            teacher: those of a frozen subnet that is sent along and sees every example once, before training.
        """


@final
class AnalyticCostModel(CostModel):
    """Counts from the blocks' shapes: stock autograd's saved bytes, three passes of MACs, bytes over link rates."""

    def cost(
        self,
        blocks: Sequence[BlockCost],
        plan: FineTunePlan,
        profile: DeviceProfile,
        work: LocalWork,
        teacher: Sequence[BlockCost] = (),
    ) -> RoundCost:
        names = set(plan.changes)
        trained = sum(
            plan.num_trained(item.name, item.shape)
            for block in blocks
            for item in block.parameters
            if item.name in names
        )
        parameters = sum(block.num_parameters for block in blocks)
        macs = sum(block.macs for block in blocks)
        statistics = sum(block.num_statistics for block in blocks)
        taught = sum(block.num_parameters + block.num_statistics for block in teacher)
        download, upload = (parameters + statistics + taught) * work.wire_bytes, trained * work.wire_bytes
        passes = (macs + self._backward_macs(blocks, names, plan)) * work.num_samples
        passes += sum(block.macs for block in teacher) * work.num_examples
        training_bytes = self._training_bytes(blocks, names, plan, work, parameters, trained)
        if teacher:  # its tensors as they came and its logits stay while the subnet trains
            training_bytes += _BYTES * (taught + work.num_examples * teacher[-1].output_elements)
            training_bytes = max(training_bytes, forward_bytes(teacher, work, beside=parameters))
        return RoundCost(
            macs=macs,
            num_parameters=parameters,
            training_bytes=training_bytes,
            download_bytes=download,
            upload_bytes=upload,
            download_seconds=download / profile.downlink_bytes_per_second,
            compute_seconds=passes / profile.macs_per_second,
            upload_seconds=upload / profile.uplink_bytes_per_second,
        )

    def _backward_macs(self, blocks: Sequence[BlockCost], names: set[str], plan: FineTunePlan) -> int:
        """MACs of one example's backward pass; a recomputed block runs forward once more."""
        again = set(itertools.chain.from_iterable(plan.recompute))
        backward = in_backward(blocks, names)
        return sum(block.macs * (BACKWARD_PASSES + (block.name in again)) for block in backward)

    def _training_bytes(
        self,
        blocks: Sequence[BlockCost],
        names: set[str],
        plan: FineTunePlan,
        work: LocalWork,
        parameters: int,
        trained: int,
    ) -> int:
        """Weights, the received copy, gradients, optimiser state, inputs, kept activations and the widest temporary.

        A recomputed block keeps its input; while one of them is recomputed, its own activations exist as well. For lean
        operations, and where a leading part of a weight trains, this is an upper bound: `fedofa.finetune.memory`
        follows what they keep.
        """
        again = set(itertools.chain.from_iterable(plan.recompute))
        backward = in_backward(blocks, names)
        kept = sum(block.input_elements if block.name in again else block.saved_elements for block in backward)
        kept += max(
            (block.saved_elements - block.input_elements for block in backward if block.name in again), default=0
        )
        temporary = 2 * max(block.widest_elements for block in blocks)
        composed = 2 * sum(block.step_elements for block in blocks)  # with their gradients
        values = 2 * parameters + composed + trained * (1 + work.optimiser_slots)
        joins = work.batch_size > 1  # a last batch of one joins the one before it
        batch = min(work.batch_size + joins, max(work.num_examples, 1))
        at_a_time = min(plan.micro_batch or batch, batch)
        inputs = (work.num_examples + batch - at_a_time) * blocks[0].input_elements
        return _BYTES * (values + at_a_time * (kept + temporary) + inputs)


def forward_bytes(blocks: Sequence[BlockCost], work: LocalWork, *, beside: int = 0) -> int:
    """Peak memory of forward passes over all examples without gradients, above the engine's floor.

    Weights, the received copy, inputs and logits, and what a batch has at a time: a block's input beside four of its
    widest tensors (a convolution's input and output, their copies in the layout that it runs in).

    Args:
        work: of which the number of examples and the size of a batch matter.
        beside: values that are in memory at the same time.
    """
    values = 2 * sum(block.num_parameters + block.num_statistics for block in blocks) + beside
    widest = max(block.input_elements + 4 * block.widest_elements for block in blocks)
    temporary = widest * min(work.batch_size + 1, work.num_examples)
    own = blocks[0].input_elements + blocks[-1].output_elements
    return _BYTES * (values + temporary + work.num_examples * own)
